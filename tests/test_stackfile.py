"""A stack file is data, whoever made it: what is not as `save_stack` writes it is refused by name,
in every reader.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import struct
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_store import make_stack, solved_stack
from hypothesis import given, settings
from hypothesis import strategies as st

from comfy_continual_lora import (
    consolidation,
    export,
    files,
    history,
    pipeline,
    requests,
    stackfile,
    store,
    versions,
)
from comfy_continual_lora.checkpoint.backbone import Backbone
from comfy_continual_lora.errors import ContinualLoraError, StackError
from comfy_continual_lora.settings import DrawSettings

DATA = Path(__file__).parent / "data"
OLD = DATA / "stack-8a93aef.safetensors"  # three concepts by `retention`, on the mini-SD; version 1
HALVES = DATA / "stack-c642c03.safetensors"  # solved_stack(3) in format version 2


def split(data: bytes) -> tuple[dict[str, Any], bytes]:
    """A safetensors file's header and body."""
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def joined(header: Any, body: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


@pytest.fixture
def whole(tmp_path: Path) -> bytes:
    """A stack of two concepts, as it is stored."""
    store.save_stack(make_stack(2), tmp_path / "whole")
    return (tmp_path / "whole").read_bytes()


def changed(data: bytes, change: Callable[[dict[str, Any]], object]) -> bytes:
    """The same file with its stack header changed."""
    header, body = split(data)
    stack = json.loads(header["__metadata__"]["stack"])
    change(stack)
    header["__metadata__"]["stack"] = json.dumps(stack)
    return joined(header, body)


def every_reader(path: Path, out: Path) -> list[Callable[[], object]]:
    checkpoint = path.with_name("mini.safetensors")
    return [
        lambda: stackfile.read_header(path),
        lambda: versions.versions(path),
        lambda: store.read_records(path),
        lambda: store.open_stack(path),
        lambda: pipeline.info(requests.InfoRequest(checkpoint, stack=path)),
        lambda: pipeline.export(requests.ExportRequest(checkpoint, out, stack=path)),
        lambda: pipeline.undo(requests.UndoRequest(checkpoint, stack=path)),
    ]


def refused(
    data: bytes, tmp_path: Path, match: str = "theirs", readers: slice = slice(None)
) -> None:
    """No reader takes the file, none writes anything, and the file stays as it was."""
    path, out = tmp_path / "theirs.concepts.safetensors", tmp_path / "a" / "b" / "out"
    path.write_bytes(data)
    before = {p for p in tmp_path.rglob("*") if p.is_file()}
    for read in every_reader(path, out)[readers]:
        with pytest.raises(StackError, match=match):
            read()
    left = {p for p in tmp_path.rglob("*") if p.is_file() and p.suffix != ".lock"} - before
    assert not left
    assert path.read_bytes() == data


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes with names")
def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "theirs.concepts.safetensors"
    os.mkfifo(path)
    for read in every_reader(path, tmp_path / "out"):
        with pytest.raises(StackError, match="a pipe or a device, not a file"):
            read()


@pytest.mark.parametrize(
    "token",
    ["../victim", "/abs/x", "..", "a/b", "a\\b", "", "V 1", "V1\n", "x" * 65, "ü", 7, None, ["V1"]],
)
def test_a_token_that_is_a_path_is_refused_everywhere(
    whole: bytes, tmp_path: Path, token: object
) -> None:
    refused(
        changed(whole, lambda stack: stack["concepts"][0].update(token=token)),
        tmp_path,
        "concept 1: token is",
    )


HTML = "<img src=x onerror=alert(1)>"
FIELDS = [
    ("preview", HTML), ("preview", "===="), ("steps", HTML), ("steps", -1), ("steps", True),
    ("steps", 1.5), ("steps", 10**30), ("images", None), ("seed", "0"), ("id", "a.b"),
    ("id", "../x"), ("noun", 3), ("noun", "a\0b"), ("noun", "\ud800"), ("method", HTML),
    ("method", "dance"),
    ("loss", 10**400), ("settings", {"rate": 10**400}),
    ("prompts", "a photo"), ("prompts", [1]), ("hashes", [HTML]),
    ("learned", "yesterday"), ("learned", 5), ("loss", "low"), ("settings", []),
    ("settings", {"rank": "16"}), ("settings", {"rank": 10**9}), ("settings", {"size": 8}),
    ("settings", {"retention_language": 2}), ("settings", {"retention_language": None}),
    ("settings", {"adapter": "../x"}), ("settings", {"a": [1]}), ("with_noun", 1),
    ("request", HTML), ("consolidated", 5),
]  # fmt: skip


@pytest.mark.parametrize(("field", "value"), FIELDS, ids=lambda value: str(value)[:20])
def test_a_field_of_another_type_is_refused_by_name(
    whole: bytes, tmp_path: Path, field: str, value: object
) -> None:
    refused(
        changed(whole, lambda stack: stack["concepts"][1].update({field: value})),
        tmp_path,
        f"concept 2: {field} is",
    )


TOPS = [
    ("fingerprint", "../x"), ("fingerprint", 5), ("rank", "2"), ("rank", 0), ("rank", True),
    ("tau", 0), ("tau", "1"), ("base", []), ("base", {"preset": "../x"}),
    ("base", {"word_widths": [9]}), ("base", {"prediction": 1}), ("concepts", {}),
    ("concepts", [1]), ("history", -1), ("history", 10**9), ("number", "1"), ("parent", -3),
    ("identity", HTML), ("change", {"kind": "x", "names": [], "when": ""}),
    ("change", {"kind": "learned", "names": [HTML * 1000], "when": "2026-01-01T00:00:00+00:00"}),
    ("version", "1"), ("version", None), ("version", 0), ("version", -1), ("version", 1.0),
    ("version", True), ("version", 4), ("version", 10**400), ("version", [[]]),
]  # fmt: skip


@pytest.mark.parametrize(("field", "value"), TOPS, ids=lambda value: str(value)[:20])
def test_the_stack_header_is_checked(
    whole: bytes, tmp_path: Path, field: str, value: object
) -> None:
    refused(changed(whole, lambda stack: stack.update({field: value})), tmp_path)


def test_fields_of_a_later_program_are_kept(whole: bytes, tmp_path: Path) -> None:
    """A later release may add fields to the same format version; what they say is not lost."""
    new = {"strength": 1.5, "later": None, "areas": [{"box": [0, 1]}]}

    def add(stack: dict[str, Any]) -> None:
        stack["change"] = {"kind": "learned", "names": [], "when": "2026-01-01T00:00:00+00:00"}
        for part in (stack, stack["base"], stack["change"], stack["concepts"][0]):
            part.update(new)

    path, out = tmp_path / "s.concepts.safetensors", tmp_path / "out"
    path.write_bytes(changed(whole, add))
    for read in every_reader(path, out)[:-1]:
        read()
    history.keep_versions(path, 3)  # stored again, with its change
    header, _ = split(path.read_bytes())
    stack = json.loads(header["__metadata__"]["stack"])
    for part in (stack, stack["base"], stack["change"], stack["concepts"][0]):
        assert {name: part.get(name) for name in new} == new
        assert part.keys().isdisjoint({"later"} - new.keys())
    assert "strength" not in stack["concepts"][1]


def test_unknown_fields_are_no_way_around_the_checks(whole: bytes, tmp_path: Path) -> None:
    deep: list[Any] = []
    for _ in range(900):
        deep = [deep]
    for value in (deep, "\ud800", float("1e999"), "x" * 100_001, {"\ud800": 1}):
        refused(
            changed(whole, lambda stack, value=value: stack["concepts"][0].update(more=value)),
            tmp_path,
        )
    refused(changed(whole, lambda stack: stack.update(rank=deep)), tmp_path, "rank is")


def test_what_the_closed_form_keeps_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "s.concepts.safetensors"
    stack = solved_stack(3)
    store.save_stack(stack, path)
    found = store.open_stack(path)
    assert found.pool.keys() == stack.pool.keys() == set()
    assert found.targets.keys() == stack.targets.keys()
    for concept, target in stack.targets.items():
        for held, read in (
            (target.numbers, found.targets[concept].numbers),
            (target.scales, found.targets[concept].scales),
        ):
            assert held.keys() == read.keys()
            assert all(torch.equal(read[name], tensor) for name, tensor in held.items())
    for concept, kept in stack.prompts.items():
        assert torch.equal(found.prompts[concept].alone, kept.alone)
        assert torch.equal(found.prompts[concept].shared, kept.shared)
    assert stack.ordinary
    assert found.ordinary
    assert found.ordinary.nouns == ("mug", "box")
    assert (found.ordinary.count, found.ordinary.share) == (40, 0.5)
    assert torch.equal(found.ordinary.moment(0.25), stack.ordinary.moment(0.25))
    before = path.read_bytes()
    store.write(found, path, 1, None, None)
    assert path.read_bytes() == before  # nothing is rounded twice


def test_targets_in_float16_are_packed(tmp_path: Path) -> None:
    """Format version 2 has them so."""
    path = tmp_path / "s.concepts.safetensors"
    shutil.copy(HALVES, path)
    found, fresh = store.open_stack(path), solved_stack(3)
    assert found.targets.keys() == fresh.targets.keys()
    for concept, target in fresh.targets.items():
        read = found.targets[concept].adapter
        for name, tensor in target.adapter.items():
            step = target.scales[name.rpartition(".")[2]]  # of the only layer
            assert ((read[name] - tensor).abs() <= 1.01 * step).all()
    store.save_stack(found, path)
    assert stackfile.read_header(path)["version"] == store.VERSION
    again = store.open_stack(path)
    assert all(
        torch.equal(again.targets[concept].numbers[name], numbers)
        for concept, target in found.targets.items()
        for name, numbers in target.numbers.items()
    )
    header, body = split(HALVES.read_bytes())
    header["wish.id2.A"]["dtype"] = "I8"
    refused(joined(header, body), tmp_path)


def _renamed(header: dict[str, Any], name: str, to: str) -> None:
    header[to] = header.pop(name)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda h: _renamed(h, "alone.id1", "alone.id9"), "belongs to no concept"),
        (lambda h: _renamed(h, "wish.id2.A", "wish.id9.A"), "belongs to no concept"),
        (lambda h: _renamed(h, "shared.id2", "alone.id2x"), "belongs to no concept"),
        (lambda h: _renamed(h, "wish.id2.A", "wish.id2.X"), "does not fit the adapter"),
        (lambda h: _renamed(h, "ordinary.listed", "ordinary.other"), "unknown tensor"),
        (lambda h: h["alone.id2"].update(shape=[4, 6]), "which does not fit"),
        (lambda h: h["alone.id2"].update(shape=[24]), "which does not fit"),
        (lambda h: h["ordinary.drawn"].update(shape=[6, 6]), "which does not fit"),
        (lambda h: h["wish.id2.A"].update(shape=[4, 4]), "does not fit the adapter"),
        (lambda h: h["wish.id2.B"].update(shape=[4, 4]), "does not fit the adapter"),
        (lambda h: h["wish.id2.B"].update(shape=[16]), "does not fit the adapter"),
        (lambda h: h["wish.id2.A"].update(dtype="U8"), "is U8, expected I8"),
        (lambda h: h["scale.id2.A"].update(dtype="I32"), "is I32, expected F32"),
        (lambda h: h["scale.id2.A"].update(shape=[1, 2]), "scale.id2 does not fit wish.id2"),
        (lambda h: h["scale.id2.B"].update(shape=[2, 1]), "scale.id2 does not fit wish.id2"),
        (lambda h: _renamed(h, "scale.id2.B", "scale.id2.D"), "scale.id2 does not fit wish.id2"),
        (lambda h: _renamed(h, "scale.id2.A", "scale.id9.A"), "belongs to no concept"),
        (lambda h: h["alone.id2"].update(dtype="I16"), "is I16, expected F16"),
    ],
)
def test_what_the_closed_form_keeps_is_checked(
    tmp_path: Path, change: Callable[[dict[str, Any]], None], match: str
) -> None:
    store.save_stack(solved_stack(3), tmp_path / "whole")
    header, body = split((tmp_path / "whole").read_bytes())
    (tmp_path / "whole").unlink()
    change(header)
    refused(joined(header, body), tmp_path, match)


@pytest.mark.parametrize(
    ("ordinary", "match"),
    [
        (None, "only one of ordinary prompts and their description"),
        ([], "a description of prompts"),
        ({"count": 0, "nouns": [], "share": None}, "count is 0"),
        ({"count": 9, "nouns": "mug", "share": None}, "a list of nouns"),
        ({"count": 9, "nouns": ["a\nb"], "share": None}, "a list of nouns"),
        ({"count": 9, "nouns": [], "share": -1}, "a share"),
        ({"count": 9, "nouns": [], "share": float("nan")}, "not a number"),
        ({"nouns": [], "share": None}, "count is missing"),
    ],
)
def test_the_description_of_ordinary_prompts_is_checked(
    tmp_path: Path, ordinary: object, match: str
) -> None:
    store.save_stack(solved_stack(2), tmp_path / "whole")
    data = (tmp_path / "whole").read_bytes()
    (tmp_path / "whole").unlink()
    refused(changed(data, lambda stack: stack.update(ordinary=ordinary)), tmp_path, match)


def test_a_stack_numbered_absurdly_can_be_changed(whole: bytes, tmp_path: Path) -> None:
    path = tmp_path / "s.concepts.safetensors"
    for number in (2**63 - 1, 10**9, 10**8, 10**8 - 1):
        path.write_bytes(changed(whole, lambda stack, n=number: stack.update(number=n, parent=n)))
        before = store.open_stack(path)
        store.save_stack(
            consolidation.undone(before), path, store.change("undone", before.records[:1])
        )
        assert history.undo(path).tokens == ["V1", "V2"]
        shutil.rmtree(files.history_folder(path))


def test_a_header_of_absurd_length_is_refused_before_it_is_parsed(tmp_path: Path) -> None:
    for one in ("[],", "1,", '{"a":1},'):
        text = '{"a":[' + one * (5_000_000 // one.count(",")) + "0]}"
        refused(joined(text.encode(), b""), tmp_path, "absurdly long", slice(1))


def test_two_concepts_of_one_word_or_id_are_refused(whole: bytes, tmp_path: Path) -> None:
    refused(
        changed(whole, lambda stack: stack["concepts"][0].update(token="v2")),
        tmp_path,
        "two concepts have the token",
    )
    refused(
        changed(whole, lambda stack: stack["concepts"][0].update(id="id2")),
        tmp_path,
        "two concepts have the id",
    )


def test_numbers_that_are_none_are_refused(whole: bytes, tmp_path: Path) -> None:
    for number in ("NaN", "Infinity", "9" * 5000):
        header, body = split(whole)
        header["__metadata__"]["stack"] = header["__metadata__"]["stack"].replace(
            '"loss": 0.1', f'"loss": {number}'
        )
        refused(joined(header, body), tmp_path)


@pytest.mark.parametrize("name", ["word.id1", "adapter.layer.to_k.A", "adapter.layer.to_k.B"])
@pytest.mark.parametrize("how", ["drop", "rename", "dtype", "shape"])
def test_every_word_and_layer_is_there_and_fits(
    whole: bytes, tmp_path: Path, name: str, how: str
) -> None:
    header, body = split(whole)
    one = header.pop(name)
    if how == "rename":
        header["pool.../../x.l.A"] = one
    elif how == "dtype":
        header[name] = {**one, "dtype": "I32"}
    elif how == "shape":
        header[name] = {**one, "shape": [1, 1, *one["shape"]]}
    refused(joined(header, body), tmp_path)


def test_numbers_that_are_not_finite_are_refused_where_tensors_are_read(
    whole: bytes, tmp_path: Path
) -> None:
    for bad in (float("nan"), float("-inf")):
        header, body = split(whole)
        start, end = header["adapter.layer.to_k.B"]["data_offsets"]
        data = body[:start] + struct.pack("<f", bad) * ((end - start) // 4) + body[end:]
        refused(joined(header, data), tmp_path, "infinite or NaN", slice(3, 4))
        refused(joined(header, data), tmp_path, "infinite or NaN", slice(5, 7))


RAW = [
    b"",
    b"{}",
    b"\x80\x04",
    b"PK\3\4",
    joined(b"[]", b""),
    joined(b"null", b""),
    joined(b"\xff\xfe", b""),
    joined(b'{"a":' + b"[" * 50_000, b""),
    joined(b'{"__metadata__":{"format":"comfy-continual-lora"}}', b""),
    struct.pack("<Q", 2**63),
    joined(b'{"a":1}', b""),
    joined(
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        b"1234",
    ),
]


@pytest.mark.parametrize("data", RAW, ids=lambda data: repr(data[:24]))
def test_files_that_are_something_else(tmp_path: Path, data: bytes) -> None:
    refused(data, tmp_path)


@settings(deadline=None)
@given(st.data())
def test_a_damaged_byte_is_refused_or_harmless(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Never a traceback; and what is taken makes sense."""
    folder = tmp_path_factory.mktemp("damaged")
    path = folder / "s"
    store.save_stack(make_stack(2), path)
    whole = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(
        whole[: data.draw(st.sampled_from([len(whole), len(whole) // 2, len(whole) - 1]))]
    )
    try:
        stack = store.open_stack(path)
    except ContinualLoraError:
        return
    assert {record.id for record in stack.records} == set(stack.words)
    tensors = [
        *stack.words.values(),
        *(t for a in (stack.adapter, *stack.pool.values()) for t in (a or {}).values()),
    ]
    assert all(t.isfinite().all() for t in tensors)
    with suppress(ContinualLoraError):  # other programs' files can't hold every finite number
        export.export_files(stack, folder / "a" / "out", folder / "a" / "out", "x")
    assert {p.name for p in folder.iterdir()} <= {"s", "a"}


# --- across programs and checkpoints -------------------------------------------------------------


@pytest.mark.slow
def test_a_stack_of_an_earlier_program_opens_and_goes_on(mini_file: Path, tmp_path: Path) -> None:
    checkpoint = Path(shutil.copy(mini_file, tmp_path))
    path = store.stack_path(checkpoint)
    shutil.copy(OLD, path)
    assert [record.token for record in store.read_records(path)] == ["V1", "V2", "V3"]
    assert stackfile.read_header(path)["identity"] == ""
    drawn = pipeline.draw(
        requests.DrawRequest(
            checkpoint, ["a photo of a V2 fish"], DrawSettings(steps=1), device="cpu"
        )
    ).pictures
    assert len(drawn) == 1
    pipeline.forget(requests.ForgetRequest(checkpoint, "V1", device="cpu"))
    assert [record.token for record in store.read_records(path)] == ["V2", "V3"]
    assert pipeline.undo(requests.UndoRequest(checkpoint)).change == "forgot V1 ball"
    before, after = store.open_stack(OLD), store.open_stack(path)
    assert before.records == after.records
    assert all(torch.equal(before.words[one], after.words[one]) for one in before.words)


def test_what_an_earlier_program_kept_can_be_gone_back_to(tmp_path: Path) -> None:
    path = tmp_path / "mini.concepts.safetensors"
    shutil.copy(OLD, path)
    stack = store.open_stack(path)
    stack = consolidation.undone(stack)
    store.save_stack(stack, path.with_name(path.name + ".previous"))
    assert [one.number for one in versions.versions(path)] == [1, 0]
    assert history.undo(path).tokens == ["V1", "V2"]
    assert [(one.number, one.current) for one in versions.versions(path)] == [
        (1, False),
        (0, True),
    ]
    assert history.restore(path, 1).tokens == ["V1", "V2", "V3"]


def test_shapes_of_another_checkpoint_are_refused_whatever_the_fingerprint(
    checkpoint: Path, backbone: Backbone
) -> None:
    stack = make_stack(1)
    stack.fingerprint = backbone.fingerprint
    store.save_stack(stack, store.stack_path(checkpoint))
    with pytest.raises(StackError, match="does not fit this checkpoint"):
        pipeline.draw(requests.DrawRequest(checkpoint, ["a V1 mug"], device="cpu"))


def test_what_could_not_be_read_again_is_not_stored(tmp_path: Path) -> None:
    path = tmp_path / "s"
    store.save_stack(make_stack(1), path)
    before = path.read_bytes()
    lines, infinite, half = make_stack(2), make_stack(2), make_stack(2)
    lines.records[1] = dataclasses.replace(lines.records[1], noun="a\0b")
    infinite.words["id2"] = infinite.words["id2"] / 0
    assert half.adapter
    del half.adapter["layer.to_k.B"]
    for stack, what in ((lines, "noun"), (infinite, "infinite or NaN"), (half, "incomplete")):
        with pytest.raises(StackError, match=what):
            store.save_stack(stack, path)
        assert path.read_bytes() == before


def test_a_word_that_both_stacks_have_stays_a_word_when_it_is_long() -> None:
    assert consolidation._new_names(make_stack(1), ["V1"]) == {"V1": "V1_2"}
    first = make_stack(1)
    first.records = [dataclasses.replace(first.records[0], token="x" * 64)]
    (name,) = consolidation._new_names(first, ["x" * 64]).values()
    assert files.TOKEN.fullmatch(name)
