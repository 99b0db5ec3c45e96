"""The canonical texts of columns: what `Texts.to_json` writes, by Arrow's string kernels.

What the kernels cannot write exactly as it does is null in their answers, and left to a loop over
rows. Tests compare the two character by character.
"""

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.data.sample import MAX_KEY_LENGTH
from pipeline.data.sources.digests import digests, in_hex

# What str.strip takes away: everything of which str.isspace is true.
_SPACE = (
    r"\t-\r\x1c-\x20\x{85}\x{a0}\x{1680}\x{2000}-\x{200a}\x{2028}\x{2029}\x{202f}\x{205f}\x{3000}"
)
_AT_AN_END = rf"^[{_SPACE}]+|[{_SPACE}]+$"
_ESCAPED_OTHERWISE = r"[\x00-\x1f]"  # than with a backslash alone
_MAY_BE_A_LIST = r"^[\[{(]|^array\(\["  # in a cell of text: see `text_columns.parsed`
# What is in none of most captions: they are JSON between quotation marks as they are.
_UNUSUAL = rf"""["\\\x00-\x1f]|^[{_SPACE}]|[{_SPACE}]$|{_MAY_BE_A_LIST}"""
_SAFE_KEY = rf"^[A-Za-z0-9_-]{{1,{MAX_KEY_LENGTH}}}$"
_READABLE_LENGTH = MAX_KEY_LENGTH - 16 - 1  # before a digest


def strings(column: pa.Array) -> pa.Array | None:
    """Returns a column of text as plain strings, or None if it is none or is damaged."""
    kind = column.type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if pa.types.is_null(kind):
        return pa.nulls(len(column), pa.string())
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        return None
    try:
        column = column.cast(pa.string())
        column.validate(full=True)
    except pa.ArrowInvalid:  # not UTF-8, or too long for one array
        return None
    return column


def json_strings(values: pa.Array) -> pa.Array:
    """Returns strings as JSON; null where they are null or hold control characters."""
    if pc.any(pc.match_substring(values, "\\")).as_py():
        values = pc.replace_substring(values, "\\", "\\\\")
    if pc.any(pc.match_substring(values, '"')).as_py():
        values = pc.replace_substring(values, '"', '\\"')
    quoted = pc.binary_join_element_wise('"', values, '"', "")
    odd = pc.match_substring_regex(values, _ESCAPED_OTHERWISE)
    return pc.if_else(odd, None, quoted) if pc.any(odd).as_py() else quoted


def captions(column: pa.Array) -> tuple[pa.Array, pa.Array] | None:
    """Returns each cell's captions as JSON without its brackets, and their number.

    A cell is a string or a list of strings. Both are null where the kernels cannot tell; None is
    returned of a column of another type.
    """
    kind = column.type
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return _lists_of_captions(column)
    texts = strings(column)
    if texts is None:
        return None
    texts = pc.fill_null(texts, "")
    if not pc.any(pc.match_substring_regex(texts, _UNUSUAL)).as_py():
        empty = pc.equal(texts, "")
        quoted = pc.binary_join_element_wise('"', texts, '"', "")
        if not pc.any(empty).as_py():
            return quoted, pa.repeat(pa.scalar(1, pa.int64()), len(texts))
        return pc.if_else(empty, "", quoted), pc.if_else(empty, 0, _ones(texts))
    texts = _stripped(texts)
    odd = pc.match_substring_regex(texts, _MAY_BE_A_LIST)
    if pc.any(odd).as_py():
        texts = pc.if_else(odd, None, texts)
    empty = pc.equal(texts, "")
    return pc.if_else(empty, "", json_strings(texts)), pc.if_else(empty, 0, _ones(texts))


def _lists_of_captions(column: pa.Array) -> tuple[pa.Array, pa.Array] | None:
    each = strings(column.flatten())
    if each is None:
        return None
    quoted = json_strings(_stripped(each))
    # A null or an empty string in a list is none of its captions, or a fault: not told here.
    quoted = pc.if_else(pc.equal(quoted, '""'), None, quoted)
    lengths = pc.fill_null(pc.list_value_length(column), 0)
    offsets = pa.concat_arrays(
        [pa.array([0], pa.int64()), pc.cumulative_sum(lengths).cast("int64")]
    )
    lists = pa.LargeListArray.from_arrays(offsets, quoted)
    joined = pc.binary_join(lists, ",")  # null where one of them is
    return joined, pc.if_else(pc.is_null(joined), None, lengths.cast(pa.int64()))


def caption_texts(image_id: pa.Array, columns: list[pa.Array]) -> tuple[pa.Array, pa.Array] | None:
    """Returns `Texts` with the captions of some columns as JSON, and how many there are.

    `image_id` is JSON. Null and None are those of `captions`.
    """
    found = [captions(column) for column in columns]
    if any(each is None for each in found):
        return None
    parts, counts = zip(*filter(None, found), strict=True)
    joined, number = parts[0], counts[0]
    for part, count in zip(parts[1:], counts[1:], strict=True):
        comma = pc.if_else(pc.and_(pc.greater(number, 0), pc.greater(count, 0)), ",", "")
        joined = pc.binary_join_element_wise(joined, comma, part, "")
        number = pc.add(number, count)
    texts = pc.binary_join_element_wise(
        '{"captions":[', joined, '],"dialogs":[],"image_id":', image_id, ',"questions":[]}', ""
    )
    return texts, number


def are_safe_keys(values: pa.Array) -> bool:
    """Whether every string can be a key as it is, and so in JSON; nulls aside."""
    return bool(pc.all(pc.match_substring_regex(values, _SAFE_KEY)).as_py() is not False)


def safe_keys(values: pa.Array) -> pa.Array:
    """Returns `safe_key` of each string; there must be no null."""
    safe = pc.match_substring_regex(values, _SAFE_KEY)
    if pc.all(safe).as_py():
        return values
    readable = pc.replace_substring_regex(values, "[^A-Za-z0-9_]+", "-")
    readable = pc.utf8_slice_codeunits(pc.utf8_trim(readable, "-"), 0, _READABLE_LENGTH)
    digest = in_hex(digests(values))
    transcribed = pc.if_else(
        pc.equal(readable, ""), digest, pc.binary_join_element_wise(readable, digest, "-")
    )
    return pc.if_else(safe, values, transcribed)


def _stripped(texts: pa.Array) -> pa.Array:
    if not pc.any(pc.match_substring_regex(texts, _AT_AN_END)).as_py():
        return texts
    return pc.replace_substring_regex(texts, _AT_AN_END, "")


def _ones(texts: pa.Array) -> pa.Array:
    return pc.if_else(pc.is_valid(texts), pa.scalar(1, pa.int64()), None)
