"""The two sides share no module, and stay what they are from one Python version to the next."""

from __future__ import annotations

import pytest

from fastdistill.alignment.experiment.demo.corpus import (
    document_windows,
    from_path,
    is_held_out,
    module_of,
    packed_windows,
    standard_library,
    train_tokenizer,
)


@pytest.fixture(scope="module")
def library():
    return standard_library()


def test_sides_share_no_module(library):
    train = {module_of(document.name) for document in library.train}
    held_out = {module_of(document.name) for document in library.held_out}
    assert not train & held_out
    size = [sum(len(d.text) for d in side) for side in (library.train, library.held_out)]
    assert size[0] > 3_000_000
    assert 0.05 < size[1] / sum(size) < 0.25


def test_nothing_of_this_machine_is_in_it(library):
    names = [document.name for document in (*library.train, *library.held_out)]
    assert not [n for n in names if "site-packages" in n or "_sysconfigdata" in n or "/test" in n]


@pytest.mark.parametrize(
    ("older", "newer"),
    [
        ("zipfile.py", "zipfile/__init__.py"),
        ("pathlib.py", "pathlib/_local.py"),
        ("datetime.py", "_pydatetime.py"),
        ("decimal.py", "_pydecimal.py"),
    ],
)
def test_a_file_that_moved_stays_on_its_side(older, newer):
    assert module_of(older) == module_of(newer)


def test_sides_are_pinned():
    # Were the rule to change, the shipped teacher would have read what is held out.
    sides = {name: is_held_out(name) for name in ("json", "logging", "inspect", "argparse", "ast")}
    assert sides == {
        "json": True,
        "logging": True,
        "inspect": True,
        "argparse": False,
        "ast": False,
    }


def test_tokenizer_loses_nothing_and_windows_are_whole(library):
    tokenizer = train_tokenizer(library.train[:20], vocab_size=400)
    text = "def λ(x):\n\treturn '☃' * x  # naïve\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    windows = packed_windows(library.train[:20], tokenizer, length=32, max_windows=50)
    assert windows.ids.shape == (50, 32)
    assert 1.0 < windows.bytes_per_token < 5.0
    again = packed_windows(library.train[:20], tokenizer, length=32, max_windows=50)
    assert windows.ids.equal(again.ids)


def test_held_out_windows_stay_within_their_document(library):
    tokenizer = train_tokenizer(library.train[:5], vocab_size=300)
    documents = library.held_out[:6]
    windows = document_windows(documents, tokenizer, length=64, per_document=3)
    assert windows.document.bincount().max() <= 3
    for ids, owner in zip(windows.ids, windows.document.tolist(), strict=True):
        encoded = tokenizer(documents[owner].text, verbose=False)["input_ids"]
        starts = [i for i in range(0, len(encoded), 64) if encoded[i : i + 64] == ids.tolist()]
        assert starts


def test_one_file_is_cut_and_its_end_held_out(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text("".join(f"line {i}\n" for i in range(8000)), encoding="utf-8")
    corpus = from_path(path)
    text = path.read_text(encoding="utf-8")
    assert "".join(d.text for d in (*corpus.train, *corpus.held_out)) == text
    assert text.endswith(corpus.held_out[-1].text)


def test_folder_is_filtered_and_split(tmp_path):
    for i in range(40):
        (tmp_path / f"note{i}.md").write_text(f"{i} " * 400, encoding="utf-8")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG" * 400)
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "log.txt").write_text("x" * 2000, encoding="utf-8")
    corpus = from_path(tmp_path)
    names = {d.name for d in (*corpus.train, *corpus.held_out)}
    assert names == {f"note{i}.md" for i in range(40)}
    assert corpus.train
    assert corpus.held_out


def test_what_is_wrong_is_named(tmp_path):
    with pytest.raises(ValueError, match="data: expected a text file or a folder"):
        from_path(tmp_path / "missing")
    with pytest.raises(ValueError, match="data: expected enough text files"):
        from_path(tmp_path)
    (tmp_path / "short.txt").write_text("too short", encoding="utf-8")
    with pytest.raises(ValueError, match="data: expected 50,000 characters"):
        from_path(tmp_path / "short.txt")
