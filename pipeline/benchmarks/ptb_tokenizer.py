"""The tokenizer of the official caption scores (Stanford's PTBTokenizer).

The COCO caption evaluator tokenises with Stanford's Penn Treebank tokenizer (CoreNLP 3.4.1) in
Java, lower-cases, and drops punctuation tokens. This is the same language in regular expressions,
found by putting probes, every character (see `ptb_characters`) and 127,000 captions, questions and
answers to the original; it needs no Java and takes each caption by itself. The original reads its
captions as one text, so that the first word of the next caption can decide whether a closing `K.`
keeps its period; here a caption ends its sentence.
"""

import re
from collections.abc import Iterator

from pipeline.benchmarks.ptb_characters import HYPHENS, LEFT_OUT, LETTER, MARK, SOFT_HYPHEN, shape

PUNCTUATION = frozenset(["''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"])
# Brackets stay, as the official scores have it: its list names -LRB- but the tokens read -lrb-.
BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
REPLACED = {
    '"': "''",
    "&quot;": "''",
    "“": "``",
    "”": "''",
    "«": "``",
    "»": "''",
    "‘": "`",
    "’": "'",
    "‛": "'",
    "‹": "`",
    "›": "'",
    "–": "--",
    "—": "--",
    "―": "--",
    "…": "...",
    "\x91": "`",
    "\x92": "'",
    "\x93": "``",
    "\x94": "''",
    "\x96": "--",
    "\x97": "--",
    **dict.fromkeys(HYPHENS, "-"),
    "\x80": "$",
    "¤": "$",
    "₠": "$",
    "€": "$",
    "£": "#",
    "¢": "cents",
    "½": "1/2",
    "⅓": "1/3",
    "⅔": "2/3",
    "¼": "1/4",
    "¾": "3/4",
    "&amp;": "&",
    "&lt;": "<",
    "&gt;": ">",
    "&apos;": "'",
    "&nbsp;": "--",
    "&mdash;": "--",
}

_QUOTES = "\x91\x92\x93\x94‘’‚‛“”„‟«»‹›"  # at most two together, whichever
_DASHES = "-–—\x96\x97" + HYPHENS

AUXILIARIES = ["s", "m", "d", "t", "re", "ve", "ll"]  # after an apostrophe, a token of their own

# Written together, counted as two words.
SPLIT_WORDS = {
    "cannot": "can not",
    "gonna": "gon na",
    "gotta": "got ta",
    "wanna": "wan na",
    "gimme": "gim me",
    "lemme": "lem me",
    "'tis": "'t is",
    "'twas": "'t was",
}

# The period of these belongs to the word.
ABBREVIATIONS = """
    adm al ala alex apr ariz assn assoc atty aug ave bancorp bhd bldg blvd brig bros calif capt cf
    cie cmdr co col colo comdr conn corp cos cpl ct dec dept det dr drs elec ens esq est etc ext feb
    fla fri ft ga gen gov govs hon inc ind insp intl invt jan jr jul jun kan kans ky lieut lt ltd
    maj mar md messrs mfg mich minn mlle mme mo mon mont mr mrs ms msgr mt mtg natl neb nev nov oct
    okla penn pfc ph plc pres prof pvt rd rep reps rev rt sen sens sep sept sfc sgt spc sq sr st ste
    supt tel tenn thu thurs tue tues univ va vs vt wed wis wisc wm wyo
"""
CAPITALISED_ABBREVIATIONS = "ark del ill la mass miss ore pa tex wash"
ABBREVIATIONS_OF_NUMBERS = "art ca fig figs no nos op pp prop"
# Before one of these a single letter with a period ends its sentence: "made of K. The man".
SENTENCE_STARTS = """
    A About According After An As At But Earlier He Her Here However If In It Last Many More Now
    Once One Other Our She Since So Some Such That The Their Then There These They This We What When
    While Yet You
"""


def tokenize(caption: str) -> str:
    """Returns the caption's tokens, lower-case, without punctuation, joined by single spaces."""
    return " ".join(token for token in _tokens(caption) if token not in PUNCTUATION)


def _tokens(text: str) -> Iterator[str]:
    read = shape(text)  # of the same length: what is matched here is cut out of the text
    position = 0
    while True:
        if plain := _PLAIN_WORD.match(read, position):
            position = plain.end()
            yield from SPLIT_WORDS.get(plain[1].lower(), plain[1].lower()).split()
            continue
        position = _SPACE.match(read, position).end()  # type: ignore[union-attr]
        if position == len(read):
            return
        matches = (pattern.match(read, position) for pattern in _PATTERNS)
        longest = max((match for match in matches if match), key=lambda match: match.end())
        if longest[0] == LEFT_OUT or longest[0] in _SEPARATORS:
            position = longest.end()
            continue
        position = longest.end("token") if "token" in longest.re.groupindex else longest.end()
        written = _written(text[longest.start() : position]).replace(SOFT_HYPHEN, "")
        yield from (token for token in written.split(" ") if token)


def _written(token: str) -> str:
    """Returns tokens as the original prints them: brackets, quotes and signs in ASCII."""
    lower = token.lower().replace(" ", "\u00a0")
    if lower in SPLIT_WORDS:
        return SPLIT_WORDS[lower]
    if len(token) > 1 and not token.strip(_DASHES):
        return "--"
    if len(token) > 3 and not token.strip("."):
        return "..."
    if len(token) > 1 and token[0] in "<>:;=":  # in a smiley only round brackets are renamed
        return lower.replace("(", BRACKETS["("]).replace(")", BRACKETS[")"])
    if _AUXILIARY.fullmatch(lower):
        return lower.translate(_IN_ASCII)
    if len(token) == 2 and not token.strip(_QUOTES):
        return "".join(REPLACED.get(letter, letter) for letter in token)
    return "".join(BRACKETS.get(letter, letter) for letter in REPLACED.get(lower, lower))


_AUXILIARY = re.compile(f"n?['’\x92‘\x91‛](?:{'|'.join(AUXILIARIES)})")
_IN_ASCII = str.maketrans(dict.fromkeys("’\x92", "'") | dict.fromkeys("‘\x91‛", "`"))


def _any_of(words: str) -> str:
    return "|".join(words.split())


def _compiled() -> list[re.Pattern[str]]:
    """Returns the kinds of token; the longest match wins, of equals the first.

    Where a kind depends on what follows, that counts for its length and `token` names its own.
    """
    letter, joining = f"[A-Za-z{LETTER}{MARK}]", f"[A-Za-z{LETTER}]"
    apostrophe, any_quote = "['’\x92]", "['’\x92‘\x91‛]"
    # A straight apostrophe may begin a quotation: 'some words'.
    auxiliary = "(?:'(?:s|m|d|re|ve|ll)(?![A-Za-z])|[’\x92](?:s|m|d|re|ve|ll))"
    word = rf"{letter}(?:{letter}|\d)*(?:[.!?]{letter}(?:{letter}|\d)*)*"
    number = r"(?:\d*(?:[.:,٫٬]\d+)+|\d+)"
    plain = rf"(?:{joining}|\d)+"
    part = rf"(?:[dol]{any_quote}(?:{joining}|\d))?{plain}"
    hyphenated = rf"{part}(?:[-_]{part})*"
    acronym = r"[a-z](?:\.[a-z])+\."
    slashed = r"[a-z0-9]+(?:-[a-z]+){0,2}"
    exact_case = [
        rf"[A-HJ-XZn]{any_quote}{joining}{{2,}}",  # O'Sullivan, T'shirt
        r"[A-Z]+(?:[+&][A-Z]+)+",  # AT&T
        r"[A-Z]{1,3}\$",  # US$
        rf"(?:{_any_of(CAPITALISED_ABBREVIATIONS.title())})\.",
        rf"(?:{_any_of(CAPITALISED_ABBREVIATIONS.upper())})\.",
        rf"(?P<token>[A-Za-z])\.(?:\s+(?:{_any_of(SENTENCE_STARTS)})(?![A-Za-z])|\s*$)",
        r"[A-Za-z]\.",
        r"[<>]?[:;=][-o*']?[()@{|\[\]\\DPpdO](?![A-Za-z])",
    ]
    any_case = [
        rf"(?P<token>[a-z]*?(?!n)[a-z])n{any_quote}t",  # is|n't, ca|n't
        rf"n{any_quote}t(?!{letter})",
        auxiliary,
        "'t(?=is|was)",
        rf"{apostrophe}(?:n{apostrophe}|n(?=\s|$)|em|till?|cause|[2-9]0s)|[’\x92]n",
        rf"{apostrophe}\d\d(?=\s|$)",  # '09
        rf"(?:[ldj]|dunkin|somethin|ol|y(?={apostrophe}{letter})){apostrophe}",
        rf"(?:c{any_quote}mon|ma{any_quote}am|o{any_quote}clock|li{any_quote}l|nat{any_quote}l"
        rf"|nor{any_quote}easter|c{any_quote}est|s{any_quote}mores)",
        rf"[a-z]+[aeiou]{any_quote}[aeiou][a-z]*",  # hawai'i
        word,
        hyphenated,  # t-shirt, 4x4, o'neil
        rf"{plain}(?:\.{plain})*[.,]?-(?:{acronym}|{plain})",  # a.m.-p.m.
        rf"{slashed}(?:/{slashed}){{1,2}}",  # and/or
        rf"[-+]?{number}",
        r"(?:\d{1,4}[- \u00a0]?)?\d{1,4}[/⁄]\d{1,4}",  # 1 1/2
        r"\d{1,2}[-/]\d{1,2}[-/]\d{2,4}",
        r"(?:\([0-9]{2,3}\)[ \u00a0]?|(?:\+?[0-9]{2,4}[- \u00a0]){1,2})"
        r"[0-9]{3,4}[- \u00a0]?[0-9]{3,5}",
        rf"{acronym}|ph\.d\.",  # u.s.
        rf"(?:{_any_of(ABBREVIATIONS)})\.",
        rf"(?P<token>(?:{_any_of(ABBREVIATIONS_OF_NUMBERS)})\.)\s*\d",
        rf"(?P<token>(?:{word}|{hyphenated})\.)[,;:]",
        r"https?://[^\s\"<>|()]+\.[^\s\"<>|()]*[^\s\"<>|().,!?]",
        r"(?:www\.)?(?:[^\s\"<>|.!?(){},/]+\.)+(?:com|net|org|edu)"
        r"(?:/(?:[^\s\"<>|()]*[^\s\"<>|().,!?])?)?",
        rf"(?![{LETTER}{MARK}])"
        r"[^\s\"<>|().@]+(?:\.[^\s\"<>|().@]+)*@(?:[^\s\"<>|().@]+\.)*[^\s\"<>|().,@]+",
        rf"@[a-z_][a-z0-9_]*|#[a-z_{LETTER}{MARK}]+",
        r"&(?:amp|lt|gt|quot|apos|nbsp|mdash|#\d+);",
        r"<[/!]?[a-z][^<>\x80-\uffff]*>",
        r"\^_\^|-_-|>_<",
        r"[a-z]\+\+|[cf]#",
        rf"[!?]+|@+|#+|\.{{3,}}|[{_DASHES}]+|\*+|_+|``|''|[{_QUOTES}]{{1,2}}",
        "[¹²³⁰⁴-⁹]+|[₀-₉]+",
        r"\S",  # whatever else there is, each by itself
    ]
    stem = rf"(?P<token>{letter}+){auxiliary}"  # first of equals: O|'re rather than O're
    return [re.compile(pattern) for pattern in [stem, *exact_case]] + [
        re.compile(pattern, re.IGNORECASE) for pattern in any_case
    ]


_SEPARATORS = "٫٬"  # of decimals and thousands: left out but in a number

_SPACE = re.compile(r"\s*")
_PLAIN_WORD = re.compile(r"\s*([A-Za-z]+)(?=\s|$)")
_PATTERNS = _compiled()
