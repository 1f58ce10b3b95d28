"""Text to the token ids that BERT reads, through the ``tokenizers`` library.

It is an extra: ``pip install "snnk_jax[text]"``.
"""

import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from snnk_jax.models._weights import read_json

_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


class Tokens(NamedTuple):
    """A batch of token ids, as :class:`~snnk_jax.models.bert.Bert` takes it.

    Attributes:
      tokens: ids ``[n, length]``, int32; zero behind the end of a text.
      token_types: 0 for the first text and 1 for the second, int32.
      mask: False behind the end.
      truncated: which texts did not fit and lost their end, ``[n]``.
    """

    tokens: np.ndarray
    token_types: np.ndarray
    mask: np.ndarray
    truncated: np.ndarray


class BertTokenizer:
    """WordPiece tokens between ``[CLS]`` and ``[SEP]``.

    Args:
      path: a ``tokenizer.json``, a WordPiece vocabulary with a token a line, or a
        folder that holds ``tokenizer.json`` or ``vocab.txt``.
      lowercase: for a vocabulary: put text in lower case and strip accents, as the
        uncased models want it. None takes ``do_lower_case`` of a
        ``tokenizer_config.json`` beside it, True without one; its ``strip_accents``
        and ``tokenize_chinese_chars`` count too. A ``tokenizer.json`` says all of
        this itself.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if the file holds no tokenizer, lacks a special token or does not put
        them around texts, or ``lowercase`` is given for a ``tokenizer.json``.
      ImportError: without the ``tokenizers`` library.

    Example:
      >>> import pathlib, tempfile
      >>> from snnk_jax.models.bert_tokens import BertTokenizer
      >>> words = "[PAD] [UNK] [CLS] [SEP] [MASK] a dog ##s bark ."
      >>> path = pathlib.Path(tempfile.mkdtemp()) / "vocab.txt"
      >>> _ = path.write_text(words.replace(" ", chr(10)))
      >>> BertTokenizer(path)(["A dog.", "Dogs bark a lot."]).tokens
      array([[2, 5, 6, 9, 3, 0, 0, 0],
             [2, 6, 7, 8, 5, 1, 9, 3]], dtype=int32)
    """

    def __init__(self, path: str | os.PathLike[str], *, lowercase: bool | None = None):
        path = pathlib.Path(path)
        if path.is_dir():
            held = [path / name for name in ("tokenizer.json", "vocab.txt")]
            path = next((file for file in held if file.is_file()), held[0])
        if not path.is_file():
            raise FileNotFoundError(
                f"the tokenizer must be an existing file. Got {path}."
            )
        json_file = path.suffix == ".json"
        if json_file and lowercase is not None:
            raise ValueError(
                "lowercase must be None for a tokenizer.json, which says so itself. "
                f"Got {lowercase} for {path}."
            )
        self._tokenizer = _from_json(path) if json_file else _wordpiece(path, lowercase)
        absent = [t for t in _SPECIAL[:4] if self._tokenizer.token_to_id(t) is None]
        if absent:
            raise ValueError(
                f"the tokenizer must have the tokens {_SPECIAL[:4]}. Got {path} "
                f"without {absent}."
            )
        around = [self._tokenizer.num_special_tokens_to_add(p) for p in (False, True)]
        if around != [2, 3]:
            raise ValueError(
                "the tokenizer must put [CLS] and [SEP] around a text, and [SEP] "
                f"behind a second. Got {path}, which adds {around} tokens."
            )
        largest = max(self._tokenizer.get_vocab().values())
        if largest > np.iinfo(np.int32).max:
            raise ValueError(
                f"the tokenizer must have ids of 32 bits. Got {largest} in {path}."
            )
        self._pad = self._tokenizer.token_to_id("[PAD]")

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return self._tokenizer.get_vocab_size()

    def __call__(
        self,
        texts: Sequence[str],
        pairs: Sequence[str] | None = None,
        *,
        length: int | None = None,
    ) -> Tokens:
        """Encodes texts, or pairs of texts.

        Args:
          texts: the texts, or the first of each pair.
          pairs: the second of each pair.
          length: number of ids of every row; of a text that has more, the end is cut
            off (of a pair, that of the longer text). None: that of the longest text.

        Raises:
          ValueError: if ``texts`` or ``pairs`` are no lists of strings (one string is
            none), ``pairs`` are not as many as ``texts``, or ``length`` has no room for
            a token beside the special ones.
        """
        texts = _strings("texts", texts)
        pairs = None if pairs is None else _strings("pairs", pairs)
        special = 2 if pairs is None else 3
        if pairs is not None and len(pairs) != len(texts):
            raise ValueError(
                f"pairs must be as many as texts. Got {len(pairs)} and {len(texts)}."
            )
        if length is not None and length <= special:
            raise ValueError(f"length must be above {special}. Got {length}.")
        tokenizer = self._tokenizer
        tokenizer.no_padding()
        if length is None:
            tokenizer.no_truncation()
        else:
            tokenizer.enable_truncation(length)
        batch: Any = texts if pairs is None else list(zip(texts, pairs, strict=True))
        encoded = tokenizer.encode_batch(batch)
        width = length or max((len(e.ids) for e in encoded), default=special)
        tokens = np.full((len(encoded), width), self._pad, np.int32)
        token_types = np.zeros((len(encoded), width), np.int32)
        mask = np.zeros((len(encoded), width), bool)
        for row, e in enumerate(encoded):
            tokens[row, : len(e.ids)] = e.ids
            token_types[row, : len(e.ids)] = e.type_ids
            mask[row, : len(e.ids)] = True
        truncated = np.array([bool(e.overflowing) for e in encoded], bool)
        return Tokens(tokens, token_types, mask, truncated)


def _strings(name: str, texts: Any) -> list[str]:
    """Refuses one string, whose letters would be taken for texts, and other things."""
    held = [texts] if isinstance(texts, str) else list(texts)
    wrong = [text for text in held if not isinstance(text, str)]
    if wrong or isinstance(texts, str):
        raise ValueError(
            f"{name} must be a list of strings. Got {(wrong or held)[0]!r}."
        )
    return held


def _library() -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise ImportError(
            'BertTokenizer needs tokenizers: pip install "snnk_jax[text]".'
        ) from error
    return tokenizers


def _from_json(path: pathlib.Path) -> Any:
    library = _library()
    try:
        text = path.read_text("utf-8")
        json.loads(text)
        return library.Tokenizer.from_str(text)
    except Exception as error:  # the library raises bare Exceptions
        raise ValueError(
            f"the tokenizer must be a tokenizer.json. Got {path}: {error}."
        ) from error


def _normalizer_options(config: pathlib.Path) -> dict[str, bool | None]:
    """What a ``tokenizer_config.json`` says of case, accents and Chinese signs."""
    found = read_json(config, "tokenizer_config.json") if config.is_file() else {}
    options = {
        "lowercase": found.get("do_lower_case", True),
        # None: accents go with the capitals.
        "strip_accents": found.get("strip_accents"),
        "handle_chinese_chars": found.get("tokenize_chinese_chars", True),
    }
    for name, value in options.items():
        follows = name == "strip_accents" and value is None
        if not isinstance(value, bool) and not follows:
            raise ValueError(
                f"tokenizer_config.json must have true or false for {name}. "
                f"Got {value!r}."
            )
    return options


def _wordpiece(path: pathlib.Path, lowercase: bool | None) -> Any:
    library = _library()
    options = _normalizer_options(path.parent / "tokenizer_config.json")
    if lowercase is not None:
        options["lowercase"] = lowercase
    try:
        text = path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"a vocabulary must be text in UTF-8. Got {path}: {error}."
        ) from error
    # Not splitlines: vocabularies hold tokens that it takes for ends of lines.
    lines = text.removesuffix("\n").split("\n")
    vocabulary = {token: i for i, token in enumerate(lines)}
    if len(vocabulary) != len(lines):
        raise ValueError(
            f"a vocabulary must hold each token once. Got {len(lines)} lines with "
            f"{len(vocabulary)} tokens in {path}."
        )
    wordpiece = library.models.WordPiece(vocabulary, unk_token="[UNK]")
    tokenizer = library.Tokenizer(wordpiece)
    tokenizer.normalizer = library.normalizers.BertNormalizer(**options)
    tokenizer.pre_tokenizer = library.pre_tokenizers.BertPreTokenizer()
    if {"[CLS]", "[SEP]"} <= vocabulary.keys():
        separator, first = (
            ("[SEP]", vocabulary["[SEP]"]),
            ("[CLS]", vocabulary["[CLS]"]),
        )
        tokenizer.post_processor = library.processors.BertProcessing(separator, first)
    tokenizer.add_special_tokens([t for t in _SPECIAL if t in vocabulary])
    return tokenizer
