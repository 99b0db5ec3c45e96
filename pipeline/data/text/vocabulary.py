"""Vocabularies: the word pieces and the answers that a model knows."""

import json
import tempfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline import storage
from pipeline.data.sample import Question
from pipeline.errors import ConfigError

if TYPE_CHECKING:
    from transformers import BertTokenizerFast, PreTrainedTokenizerFast

SPECIAL_PIECES = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")  # their ids are their places here
_KNOWN_BY = "tokenizer_config.json"
MAX_LETTERS = 1000  # the commonest letters kept; rarer ones make their word [UNK], as in BERT


def build_tokenizer(captions: Iterable[str], vocab_size: int) -> "BertTokenizerFast":
    """Trains a lower-cased BERT WordPiece tokenizer of at most `vocab_size` pieces.

    The same captions in any order give the same ids. A small corpus gives fewer pieces than
    asked for. Raises ConfigError if there is no word, or no room for the letters alone.
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers import BertTokenizerFast

    normalizer = normalizers.BertNormalizer(lowercase=True)
    splitter = pre_tokenizers.BertPreTokenizer()
    words: Counter[str] = Counter()
    for chunk, count in Counter(chunk for caption in captions for chunk in caption.split()).items():
        for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(chunk)):
            words[word] += count
    if not words:
        raise ConfigError("vocabulary: no word found in the captions; give a vocab.txt instead")

    letters: Counter[str] = Counter()
    for word, count in words.items():
        for letter in word:
            letters[letter] += count
    alphabet = set(sorted(letters, key=lambda letter: (-letters[letter], letter))[:MAX_LETTERS])
    kept = sorted(word for word in words if alphabet.issuperset(word))
    # The trainer numbers letters in the order of a randomly seeded hash table, so that ids differ
    # from run to run, unless it meets them as special tokens first.
    first = sorted({letter for word in kept for letter in word})
    inner = sorted({f"##{letter}" for word in kept for letter in word[1:]})
    pieces = [*SPECIAL_PIECES, *first, *inner]
    if vocab_size < len(pieces):
        raise ConfigError(
            f"vocab_size={vocab_size} leaves no room for {len(SPECIAL_PIECES)} special pieces and "
            f"{len(first)} letters, alone and within words; give at least {len(pieces)}"
        )
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        special_tokens=pieces,
        limit_alphabet=MAX_LETTERS,
        show_progress=False,
    )
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.train_from_iterator((" ".join([word] * words[word]) for word in kept), trainer)
    return BertTokenizerFast(vocab=tokenizer.get_vocab(), do_lower_case=True)


def load_tokenizer(location: str | Path) -> "PreTrainedTokenizerFast":
    """Reads a tokenizer from a `vocab.txt` (lower-cased BERT) or a folder in the HF layout.

    One without BERT's special tokens, as GPT-2's and Llama's, begins a text with its `bos` for
    [CLS] and ends it with its `eos` for [SEP]; `eos` stands for [PAD] and [MASK] too.
    Raises ConfigError if there is no such file or folder, or it holds no tokenizer.
    """
    from transformers import AutoTokenizer, BertTokenizerFast

    if not storage.is_local(str(location)):
        with tempfile.TemporaryDirectory(prefix="sightline-") as folder:
            return load_tokenizer(_fetched(str(location), Path(folder)))
    path = storage.local_path(str(location)).expanduser()
    if path.is_dir() and (path / _KNOWN_BY).exists():
        _require_objects(path)
        try:
            tokenizer: PreTrainedTokenizerFast = AutoTokenizer.from_pretrained(
                path, local_files_only=True
            )
            _name_special_tokens(tokenizer)
        except Exception as error:  # whatever the library makes of files that it does not check
            reason = " ".join(str(error).split())[:200]
            raise ConfigError(
                f"tokenizer: {location}: transformers cannot read it: {reason}"
            ) from error
        _require_special_tokens(tokenizer, str(location))
        return tokenizer
    vocabulary = path / "vocab.txt" if path.is_dir() else path
    if not vocabulary.is_file():
        raise ConfigError(
            f"tokenizer: {location}: expected a vocab.txt or a folder with one or with "
            "tokenizer_config.json, found " + ("neither in it" if path.is_dir() else "nothing")
        )
    try:
        lines = vocabulary.read_text(encoding="utf-8").rstrip("\n").split("\n")
    except ValueError as error:
        raise ConfigError(f"tokenizer: {vocabulary}: not UTF-8: {error}") from error
    pieces = {piece: number for number, piece in enumerate(lines)}
    absent = [piece for piece in SPECIAL_PIECES if piece not in pieces]
    if absent:
        raise ConfigError(
            f"tokenizer: {vocabulary}: expected one piece a line, {', '.join(absent)} among them; "
            f"found {len(lines)} lines without"
        )
    return BertTokenizerFast(vocab=pieces, do_lower_case=True)


def save_tokenizer(tokenizer: "PreTrainedTokenizerFast", folder: str) -> None:
    """Writes a tokenizer in the HF layout, the file by which it is known last."""
    with tempfile.TemporaryDirectory(prefix="sightline-") as local:
        tokenizer.save_pretrained(local)
        for path in sorted(Path(local).iterdir(), key=lambda path: path.name == _KNOWN_BY):
            storage.write_bytes(storage.join(folder, path.name), path.read_bytes())


def _fetched(location: str, folder: Path) -> Path:
    """Copies a tokenizer's files, or a vocab.txt, from an object store."""
    names = storage.list_names(location)
    for name in names:
        (folder / name).write_bytes(storage.read_bytes(storage.join(location, name)))
    if not names and storage.exists(location):
        (folder / "vocab.txt").write_bytes(storage.read_bytes(location))
    return folder


def _require_objects(folder: Path) -> None:
    """Raises ConfigError naming the first of a tokenizer's files that is damaged."""
    for path in sorted(folder.glob("*token*.json")):
        try:
            document = json.loads(path.read_bytes())
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"tokenizer: {path}: damaged: not JSON: {error}") from error
        if not isinstance(document, dict):
            raise ConfigError(
                f"tokenizer: {path}: expected an object, found {type(document).__name__}"
            )


def _require_special_tokens(tokenizer: "PreTrainedTokenizerFast", location: str) -> None:
    """Raises ConfigError for a tokenizer without words, or without a token that we put in texts."""
    known = len(tokenizer)
    if known <= len(tokenizer.all_special_ids):
        raise ConfigError(
            f"tokenizer: {location}: it has no words but {known} special tokens; tokenizer.json or "
            "vocab.txt is missing"
        )
    for name in ("cls", "sep", "pad", "mask"):
        number = getattr(tokenizer, f"{name}_token_id")
        if not isinstance(number, int) or number >= known:
            raise ConfigError(
                f"tokenizer: {location}: it has {known} words and no {name}_token among them; "
                "is tokenizer_config.json that of another tokenizer?"
            )


def _name_special_tokens(tokenizer: "PreTrainedTokenizerFast") -> None:
    """Lets a tokenizer's own special tokens answer to the names of BERT's that it lacks."""
    begin, end = tokenizer.bos_token or tokenizer.eos_token, tokenizer.eos_token
    for name, stand_in in {"cls": begin, "sep": end, "pad": end, "mask": end}.items():
        if getattr(tokenizer, f"{name}_token") is None:
            setattr(tokenizer, f"{name}_token", stand_in)


def answer_vocabulary(
    questions: Iterable[Question], max_answers: int, min_count: int = 1
) -> list[str]:
    """Returns the commonest answers: at most `max_answers`, each to `min_count` questions or more.

    A question counts for the answer that most people gave to it (of equals, the first in
    alphabetical order). Ordered by falling count, then by text, so that the same questions in any
    order give the same list.
    """
    counts: Counter[str] = Counter()
    for question in questions:
        if question.answers:
            votes = Counter(question.answers)
            counts[min(votes, key=lambda answer: (-votes[answer], answer))] += 1
    common = sorted(
        (answer for answer, count in counts.items() if count >= min_count),
        key=lambda answer: (-counts[answer], answer),
    )
    return common[:max_answers]
