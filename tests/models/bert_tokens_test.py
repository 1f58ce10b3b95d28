import json
import sys

import numpy as np
import pytest

from snnk_jax.models.bert_tokens import BertTokenizer

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "a", "dog", "##s"]
WORDS += ["bark", "##ed", ".", ","]
PAD, UNK, CLS, SEP = range(4)
ID = {word: i for i, word in enumerate(WORDS)}


@pytest.fixture
def path(tmp_path):
    pytest.importorskip("tokenizers")
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join(WORDS))
    return path


def ids(text):
    return [ID[word] for word in text.split()]


def test_words_are_cut_into_the_longest_pieces_and_framed(path):
    batch = BertTokenizer(path)(["The dogs barked.", "A cat, barked"])
    np.testing.assert_array_equal(
        batch.tokens,
        [
            [CLS, *ids("the dog ##s bark ##ed ."), SEP],
            [CLS, ID["a"], UNK, *ids(", bark ##ed"), SEP, PAD],
        ],
    )
    np.testing.assert_array_equal(batch.mask, batch.tokens != PAD)
    assert not batch.token_types.any()
    assert not batch.truncated.any()
    assert batch.tokens.dtype == batch.token_types.dtype == np.int32


def test_pairs_have_two_types(path):
    batch = BertTokenizer(path)(["a dog", "dogs"], ["barked", "the dog ."], length=9)
    first = [CLS, *ids("a dog"), SEP, *ids("bark ##ed"), SEP, PAD, PAD]
    np.testing.assert_array_equal(batch.tokens[0], first)
    np.testing.assert_array_equal(batch.token_types[0], [0] * 4 + [1] * 3 + [0] * 2)
    assert batch.tokens.shape == (2, 9)


def test_a_long_text_loses_its_end_and_says_so(path):
    batch = BertTokenizer(path)(["the dog", "the dog barked a dog"], length=5)
    np.testing.assert_array_equal(batch.tokens[1], [CLS, *ids("the dog bark"), SEP])
    np.testing.assert_array_equal(batch.truncated, [False, True])


def test_of_a_pair_the_longer_text_is_cut(path):
    batch = BertTokenizer(path)(["the dog barked a dog"], ["a dog"], length=8)
    np.testing.assert_array_equal(
        batch.tokens[0], [CLS, *ids("the dog bark"), SEP, *ids("a dog"), SEP]
    )


def test_one_batch_leaves_no_trace_in_the_next(path):
    tokenizer = BertTokenizer(path)
    before = tokenizer(["the dog barked a dog"])
    tokenizer(["the dog"], length=4)
    np.testing.assert_array_equal(tokenizer(["the dog barked a dog"])[0], before[0])


def test_no_texts_and_empty_ones(path):
    tokenizer = BertTokenizer(path)
    assert tokenizer([]).tokens.shape == (0, 2)
    np.testing.assert_array_equal(tokenizer([""], length=4).tokens, [[CLS, SEP, 0, 0]])


def test_case_and_accents_go_unless_they_shall_stay(path):
    assert BertTokenizer(path)(["DÖG"]).tokens.tolist() == [[CLS, ID["dog"], SEP]]
    cased = BertTokenizer(path, lowercase=False)
    assert cased(["DOG"]).tokens.tolist() == [[CLS, UNK, SEP]]


def test_the_config_beside_a_vocabulary_says_whether_case_stays(path):
    config = path.parent / "tokenizer_config.json"
    config.write_text(json.dumps({"do_lower_case": False}))
    assert BertTokenizer(path)(["DOG"]).tokens.tolist() == [[CLS, UNK, SEP]]
    lower = BertTokenizer(path.parent, lowercase=True)
    assert lower(["DOG"]).tokens.tolist() == [[CLS, ID["dog"], SEP]]
    config.write_text(json.dumps({"do_lower_case": "no"}))
    with pytest.raises(ValueError, match="must have true or false for lowercase"):
        BertTokenizer(path)


def test_a_token_that_ends_lines_elsewhere_is_a_token(path):
    """Multilingual vocabularies hold U+2028, which str.splitlines would split at."""
    path.write_text("\n".join([*WORDS, "\u2028", "\x85", "cat"]) + "\n", "utf-8")
    tokenizer = BertTokenizer(path)
    assert tokenizer.vocab_size == len(WORDS) + 3
    assert tokenizer(["cat"]).tokens.tolist() == [[CLS, len(WORDS) + 2, SEP]]


def test_a_tokenizer_json_and_its_folder_give_the_same(path, tmp_path):
    tokenizer = BertTokenizer(path)
    (tmp_path / "tokenizer.json").write_text(tokenizer._tokenizer.to_str())
    texts = ["The dogs barked.", "A cat"]
    for place in (tmp_path / "tokenizer.json", tmp_path):
        np.testing.assert_array_equal(
            BertTokenizer(place)(texts)[0], tokenizer(texts)[0]
        )
    assert tokenizer.vocab_size == len(WORDS)


def test_a_folder_with_a_vocabulary_alone(path):
    assert BertTokenizer(path.parent)(["dog"]).tokens.tolist() == [
        [CLS, ID["dog"], SEP]
    ]


def test_the_uncased_vocabulary_of_bert(data_dir):
    pytest.importorskip("tokenizers")
    tokenizer = BertTokenizer(data_dir("bert_vocab") / "bert_uncased_vocab.txt")
    assert tokenizer.vocab_size == 30522
    # The example of the BERT repository's README.
    tokens = tokenizer(["John Johanson's house"]).tokens[0]
    pieces = [tokenizer._tokenizer.id_to_token(int(i)) for i in tokens]
    assert pieces == ["[CLS]", "john", "johan", "##son", "'", "s", "house", "[SEP]"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[PAD]\n[UNK]\n[CLS]\ndog", r"must have the tokens .* without \['\[SEP\]'\]"),
        ("[PAD]\n[PAD]\n[UNK]", "each token once. Got 3 lines with 2 tokens"),
    ],
)
def test_a_wrong_vocabulary_is_refused(path, content, message):
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        BertTokenizer(path)


@pytest.mark.parametrize("content", ["{", "[]", json.dumps({"model": 3}), ""])
def test_a_wrong_tokenizer_json_is_refused(path, content):
    file = path.parent / "tokenizer.json"
    file.write_text(content)
    with pytest.raises(ValueError, match="the tokenizer must be a tokenizer.json"):
        BertTokenizer(file)


def test_a_missing_file_is_told(path):
    with pytest.raises(FileNotFoundError, match="must be an existing file"):
        BertTokenizer(path.parent / "none.txt")


def test_mistakes_are_told(path):
    tokenizer = BertTokenizer(path)
    with pytest.raises(ValueError, match="as many as texts. Got 2 and 1"):
        tokenizer(["a"], ["a", "dog"])
    with pytest.raises(ValueError, match="length must be above 2. Got 2"):
        tokenizer(["a"], length=2)
    with pytest.raises(ValueError, match="length must be above 3. Got 3"):
        tokenizer(["a"], ["a"], length=3)


def test_without_the_library_it_says_what_to_install(path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ImportError, match=r'pip install "snnk_jax\[text\]"'):
        BertTokenizer(path)


def test_the_config_beside_a_vocabulary_says_what_becomes_of_accents(tmp_path):
    pytest.importorskip("tokenizers")
    path = tmp_path / "vocab.txt"
    words = [*WORDS[:5], "über", "uber", "中国", "中", "国"]
    path.write_text("\n".join(words), "utf-8")
    config = {"strip_accents": False, "tokenize_chinese_chars": False}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert BertTokenizer(path)(["Über 中国"]).tokens.tolist() == [[CLS, 5, 7, SEP]]
    (tmp_path / "tokenizer_config.json").unlink()
    assert BertTokenizer(path)(["Über 中国"]).tokens.tolist() == [[CLS, 6, 8, 9, SEP]]


def test_lowercase_is_no_argument_for_a_tokenizer_json(path, tmp_path):
    file = tmp_path / "tokenizer.json"
    file.write_text(BertTokenizer(path)._tokenizer.to_str())
    with pytest.raises(ValueError, match="lowercase must be None for a tokenizer.json"):
        BertTokenizer(file, lowercase=False)


def test_a_tokenizer_json_must_frame_texts_and_have_small_ids(path, tmp_path):
    file = tmp_path / "tokenizer.json"
    whole = json.loads(BertTokenizer(path)._tokenizer.to_str())
    file.write_text(json.dumps(whole | {"post_processor": None}))
    with pytest.raises(ValueError, match=r"\[CLS\] and \[SEP\] around a text"):
        BertTokenizer(file)
    whole["model"]["vocab"]["bark"] = 2**32 - 1
    file.write_text(json.dumps(whole))
    with pytest.raises(ValueError, match="ids of 32 bits. Got 4294967295"):
        BertTokenizer(file)


def test_a_vocabulary_in_another_encoding_is_refused(path):
    path.write_bytes("[PAD]\nÄ".encode("latin1"))
    with pytest.raises(ValueError, match=r"text in UTF-8. Got .*vocab.txt"):
        BertTokenizer(path)


@pytest.mark.usefixtures("unchecked")
def test_what_is_no_list_of_strings_is_refused(path):
    tokenizer = BertTokenizer(path)
    with pytest.raises(ValueError, match="texts must be a list of strings. Got 'A dog"):
        tokenizer("A dog.")
    with pytest.raises(ValueError, match="texts must be a list of strings. Got None"):
        tokenizer(["a", None])
    texts = ("a", "b a")
    given = (text for text in texts)
    assert tokenizer(given).tokens.tolist() == tokenizer(texts).tokens.tolist()
    with pytest.raises(ValueError, match="pairs must be a list of strings. Got 'b'"):
        tokenizer(["a"], "b")
