import base64
import json
import time

import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

from nanokv import tokenizer
from nanokv.config import UserError

CORPUS = [
    "def first(x):\n    return x + 1\n\n\nclass Second: pass\nfor i in range(100):\n    print(i)\n" * 3,
    "naïve café 数学 🙂 " * 20,
]
BYTE = tokenizer.train("byte", [])
BPE = tokenizer.train("bpe", CORPUS, 300)


def every_kind():
    return [BYTE, BPE, tokenizer.train("char", CORPUS), tokenizer.IdsTokenizer(100)]


@pytest.mark.parametrize("tok", [BYTE, BPE], ids=["byte", "bpe"])
@settings(max_examples=200, deadline=None)
@given(text=st.text() | st.text(alphabet=" \t\r\n.'x3é<|>"))
def test_any_text_round_trips(tok, text):
    ids = tok.encode_ordinary(text)
    assert tok.decode(ids) == text
    assert b"".join(tok.decode_single_token_bytes(i) for i in ids) == text.encode()


@given(text=st.text(alphabet="".join(CORPUS)))
def test_char_round_trips_and_is_one_id_a_character(text):
    tok = tokenizer.train("char", CORPUS)
    ids = tok.encode_ordinary(text)
    assert len(ids) == len(text)
    assert tok.decode(ids) == text
    assert tok.decode_bytes(ids) == text.encode()


def test_char_ids_are_in_sorted_order_as_in_nanogpt():
    assert tokenizer.train("char", ["cab", "d"]).encode_ordinary("abcd") == [0, 1, 2, 3]


def test_char_names_an_unknown_character_and_the_remedy():
    with pytest.raises(UserError, match="character 'é'.*byte or bpe"):
        tokenizer.train("char", ["abc"]).encode_ordinary("é")


def test_byte_ids_are_bytes():
    assert BYTE.encode_ordinary("aé") == [97, 0xC3, 0xA9]
    assert (BYTE.n_vocab, BYTE.eot_token) == (257, 256)


def test_bpe_has_the_size_asked_for_and_merges():
    assert (BPE.n_vocab, BPE.eot_token) == (300, 299)
    assert len(BPE.encode_ordinary(CORPUS[0])) < len(CORPUS[0].encode()) / 1.5


def test_digits_newlines_and_indents_are_apart():
    text = "if x == 1990:\n        y\n"
    tok = tokenizer.train("bpe", [text * 50], 300)
    tokens = [tok.decode_single_token_bytes(i) for i in tok.encode_ordinary(text)]
    assert tokens == [b"if", b" x", b" ==", b" ", b"1", b"9", b"9", b"0", b":\n", b"       ", b" y", b"\n"]


def test_special_tokens_in_text_are_text():
    for tok in (BYTE, BPE):
        ids = tok.encode_ordinary("<|endoftext|>")
        assert tok.eot_token not in ids
        assert tok.decode(ids) == "<|endoftext|>"


def test_bpe_says_when_the_corpus_is_too_small(capsys):
    assert tokenizer.train("bpe", ["ab"], 1000).n_vocab < 1000
    assert "too small for 1000" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("kind", "texts", "vocab_size", "message"),
    [
        ("bpe", CORPUS, 256, "at least 257"),
        ("bpe", CORPUS, -1, "at least 257"),
        ("bpe", [], 300, "empty corpus"),
        ("char", ["", ""], 0, "empty corpus"),
        ("bytes", CORPUS, 0, "unknown tokenizer 'bytes': choose one of byte, char, bpe, gpt2"),
    ],
)
def test_faults_of_train(kind, texts, vocab_size, message):
    with pytest.raises(UserError, match=message):
        tokenizer.train(kind, texts, vocab_size)


def test_ids_read_and_print_numbers():
    tok = tokenizer.IdsTokenizer(100)
    assert tok.encode_ordinary("3 17\n5") == [3, 17, 5]
    assert tok.decode([3, 17, 5]) == "3 17 5 "
    for bad in ("100", "x", "-1"):
        with pytest.raises(UserError, match=f"'{bad}' is no token id"):
            tok.encode_ordinary(bad)


@pytest.mark.parametrize("tok", every_kind(), ids=lambda tok: tok.name)
def test_save_and_load(tok, tmp_path):
    tokenizer.save(tok, tmp_path)
    again = tokenizer.load(tmp_path)
    text = "1 2 3" if tok.name == "ids" else "return café\n\n  数"
    assert again.encode_ordinary(text) == tok.encode_ordinary(text)
    assert (again.name, again.n_vocab, again.eot_token) == (tok.name, tok.n_vocab, tok.eot_token)
    assert tokenizer.sha256(again) == tokenizer.sha256(tok)


def test_each_tokenizer_has_its_own_hash():
    others = [tokenizer.train("bpe", CORPUS, 301), tokenizer.CharTokenizer("ab"), tokenizer.CharTokenizer("ba")]
    assert len({tokenizer.sha256(tok) for tok in [*every_kind(), *others]}) == 7


def test_byte_lengths_add_up_to_the_text():
    for tok in (BYTE, BPE):
        ids = tok.encode_ordinary(CORPUS[1])
        assert tokenizer.byte_lengths(tok)[[*ids, tok.eot_token]].sum() == len(CORPUS[1].encode())


def test_load_where_there_is_none(tmp_path):
    with pytest.raises(UserError, match="holds no tokenizer"):
        tokenizer.load(tmp_path)
    tokenizer.save(BPE, tmp_path)
    (tmp_path / "tokenizer.tiktoken").unlink()
    with pytest.raises(UserError, match=r"tokenizer\.tiktoken is missing"):
        tokenizer.load(tmp_path)


def damage_rank(folder):
    path = folder / "tokenizer.tiktoken"
    lines = path.read_bytes().splitlines(keepends=True)
    lines[280] = base64.b64encode(b"never merged") + b" 280\n"
    path.write_bytes(b"".join(lines))


def damage_truncate(folder):
    path = folder / "tokenizer.tiktoken"
    path.write_bytes(path.read_bytes()[:1000])


def damage_pattern(folder):
    path = folder / "tokenizer_spec.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pattern": "x"}))


def damage_json(folder):
    (folder / "tokenizer_spec.json").write_text("[1]")


@pytest.mark.parametrize("damage", [damage_rank, damage_truncate, damage_pattern, damage_json])
def test_a_damaged_tokenizer_is_refused(damage, tmp_path):
    tokenizer.save(BPE, tmp_path)
    damage(tmp_path)
    with pytest.raises(UserError, match="is damaged"):
        tokenizer.load(tmp_path)


def fake_gpt2():
    """As many tokens as GPT-2 has, known at once."""
    singles = [bytes([b]) for b in range(256)]
    tokens = singles + [b"%05d" % i for i in range(tokenizer.GPT2_N_VOCAB - 1 - 256)]
    ranks = {token: rank for rank, token in enumerate(tokens)}
    return tiktoken.Encoding("gpt2", pat_str=".+", mergeable_ranks=ranks, special_tokens={"<|endoftext|>": len(tokens)})


def test_gpt2_is_saved_whole_so_that_a_run_needs_no_network(tmp_path, monkeypatch):
    encoding = fake_gpt2()
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: encoding)
    tokenizer.save(tokenizer.train("gpt2", []), tmp_path)
    monkeypatch.setattr(tiktoken, "get_encoding", None)
    tok = tokenizer.load(tmp_path)
    assert (tok.name, tok.n_vocab, tok.eot_token) == ("gpt2", 50257, 50256)


def test_gpt2_without_network_is_one_line(monkeypatch):
    def offline(name):
        raise ConnectionError("a long story")

    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    with pytest.raises(UserError, match=r"ConnectionError.*TIKTOKEN_CACHE_DIR"):
        tokenizer.train("gpt2", [])


def test_gpt2_does_not_wait_for_ever(monkeypatch):
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: time.sleep(5))
    monkeypatch.setattr(tokenizer, "DOWNLOAD_SECONDS", 0.05)
    start = time.monotonic()
    with pytest.raises(UserError, match="no answer"):
        tokenizer.train("gpt2", [])
    assert time.monotonic() - start < 3
