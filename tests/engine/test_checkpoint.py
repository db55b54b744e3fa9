from __future__ import annotations

import hashlib
import os
import pickle
import resource
import zipfile
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import norm
from engine import checkpoint
from engine.checkpoint import KEYS, export_weights, load, load_identified, load_trained, load_weights, read, save
from engine.errors import UserError


def state(**more: Any) -> dict[str, Any]:
    return {**dict.fromkeys(KEYS), "format": 1, "model": {"w": torch.arange(6.0).reshape(2, 3)}, **more}


@pytest.fixture
def no_space() -> Iterator[None]:
    """No file may grow beyond 4 KiB, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_round_trip(tmp_path: Path) -> None:
    kept = state(step=3, meta={"classes": ["a"]}, rng=[{"python": (3, (1, 2), None)}], ema=None)
    save(tmp_path / "a.pt", kept)
    back = load(tmp_path / "a.pt")
    assert torch.equal(back.pop("model")["w"], kept.pop("model")["w"])
    assert back == kept
    assert [one.name for one in tmp_path.iterdir()] == ["a.pt"]


def test_old_file_stands_until_the_new_one_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "last.pt"
    save(path, state(step=1))
    during: list[Any] = []
    synced: list[str] = []
    real_save, real_sync = torch.save, os.fsync

    def looking(content: Any, file: str) -> None:
        real_save(content, file)
        during.append((Path(file).parent, Path(file) != path, load(path)["step"]))

    def sync(descriptor: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        real_sync(descriptor)

    monkeypatch.setattr(torch, "save", looking)
    monkeypatch.setattr(os, "fsync", sync)
    save(path, state(step=2))
    assert during == [(tmp_path, True, 1)]
    assert load(path)["step"] == 2
    assert len(synced) == 2 and ".last.pt" in synced[0] and synced[1] == str(tmp_path)


def test_full_disk(tmp_path: Path, no_space: None) -> None:
    path = tmp_path / "last.pt"
    save(path, state(step=1))
    with pytest.raises(
        UserError, match=r"last.pt: cannot write: File too large; check the permissions and the free space of "
    ):
        save(path, state(step=2, model={"w": torch.zeros(100_000)}))
    assert load(path)["step"] == 1
    assert [one.name for one in tmp_path.iterdir()] == ["last.pt"]


def test_no_such_folder_and_folder_that_is_a_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gone/a.pt: cannot write: "):
        save(tmp_path / "gone" / "a.pt", state())
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file/a.pt: cannot write: "):
        export_weights(tmp_path / "file" / "a.pt", {"w": torch.zeros(1)})


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_no_permission(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match=r"a.pt: cannot write: "):
        save(tmp_path / "a.pt", state())


def test_a_mistake_in_the_content_is_not_a_full_disk(tmp_path: Path) -> None:
    with pytest.raises((AttributeError, pickle.PicklingError)):
        save(tmp_path / "a.pt", state(meta=lambda: 0))
    assert not list(tmp_path.iterdir())


class Evil:
    def __reduce__(self) -> Any:
        return os.system, ("touch was_run",)


def test_the_arguments_that_other_programs_keep_are_no_code(tmp_path: Path) -> None:
    """torchvision's and timm's reference scripts write them beside the weights."""
    torch.save({"model": {"a": torch.ones(1)}, "args": Namespace(lr=0.1, opt="sgd")}, tmp_path / "x.pth")
    assert torch.equal(read(tmp_path / "x.pth")["model"]["a"], torch.ones(1))
    torch.save({"args": Namespace(lr=Evil())}, tmp_path / "evil.pth")
    with pytest.raises(UserError, match=r"refused, because the file refers to the code (posix|os).system"):
        read(tmp_path / "evil.pth")


@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
def test_code_is_refused(tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "evil.pt"
    if form == "pickle":
        path.write_bytes(pickle.dumps(Evil()))
    else:
        torch.save(state(meta=Evil()), path, _use_new_zipfile_serialization=form == "zip")
    held = "is a bare pickle" if form == "pickle" else r"refers to the code (posix|os).system"
    with pytest.raises(
        UserError, match=rf"evil.pt: refused, because the file {held} and loading it could run anything"
    ):
        load(path)
    assert not (tmp_path / "was_run").exists()


def test_a_pickled_model_is_refused(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2), tmp_path / "model.pt")
    with pytest.raises(
        UserError, match=r"model.pt: refused, because the file refers to the code torch.nn.modules.linear.Linear"
    ):
        read(tmp_path / "model.pt")


@pytest.mark.parametrize("part", [0.1, 0.5, 0.99])
def test_truncated(tmp_path: Path, part: float) -> None:
    path = tmp_path / "a.pt"
    save(path, state(model={"w": torch.zeros(5000)}))
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * part)])
    with pytest.raises(UserError, match=r"a.pt: the checkpoint is truncated \(\d+ bytes, its end is missing\)"):
        load(path)


def test_a_folder_or_a_slip_in_the_name_is_told_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "best.pt").touch()
    with pytest.raises(UserError) as error:
        read(tmp_path)
    assert str(error.value) == f"{tmp_path}: cannot read the checkpoint: Is a directory; {tmp_path} has best.pt"
    (tmp_path / "last.pt").touch()
    with pytest.raises(UserError, match=r"bets.pt: cannot .*: No such file or directory; .* has best.pt and last.pt$"):
        read(tmp_path / "bets.pt")


def test_other_bad_files(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    with pytest.raises(UserError, match=r"a.pt: cannot read the checkpoint: No such file"):
        load(path)
    path.touch()
    with pytest.raises(UserError, match=r"a.pt: the file is empty \(0 bytes\), expected a checkpoint"):
        load(path)
    path.write_bytes(b"\x89PNG\r\n")
    with pytest.raises(UserError, match=r"a.pt: not a checkpoint \(its first bytes are b'\\x89PNG'\)"):
        load(path)
    path.write_bytes(b"\x80\x02damaged")
    with pytest.raises(UserError, match=r"a.pt: the checkpoint is damaged: "):
        load(path)
    with pytest.raises(UserError, match=r"cannot read the checkpoint: Is a directory"):
        load(tmp_path)
    (tmp_path / "a.safetensors").write_bytes(b"1234567890")
    with pytest.raises(UserError, match=r"a.safetensors: not a whole safetensors file: "):
        read(tmp_path / "a.safetensors")


def test_a_turned_bit_is_found(tmp_path: Path) -> None:
    """torch.load itself takes the changed weights without a word."""
    path = tmp_path / "a.pt"
    save(path, state(task="seg"))
    data = bytearray(path.read_bytes())
    data[data.index(torch.arange(6.0).numpy().tobytes()) + 6] ^= 1
    path.write_bytes(data)
    assert torch.load(path, weights_only=True)["model"]["w"][0, 1] != 1
    with pytest.raises(UserError, match=r"a.pt: the checkpoint is damaged: .*data/0 in it is not what was written"):
        load(path)


@pytest.mark.parametrize("instructions", [b"\x80\x02.", b"\x80\x02}}K\x01s."])  # nothing on the stack; a dict for a key
def test_instructions_that_make_no_sense(tmp_path: Path, instructions: bytes) -> None:
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
        archive.writestr("archive/data.pkl", instructions)
        archive.writestr("archive/version", "3\n")
    with pytest.raises(UserError, match="a.pt: the checkpoint is damaged: "):
        load(tmp_path / "a.pt")


@pytest.mark.parametrize(
    ("part", "text"),
    [
        ({"config": 3}, "config: found a int, expected a dict"),
        ({"meta": None}, "meta: found a NoneType, expected a dict"),
        ({"ema": [1]}, "ema: found a list, expected a dict"),
        ({"task": "paint"}, "a checkpoint of the task 'paint', expected one of 'seg'"),
    ],
)
def test_parts_of_another_kind(tmp_path: Path, part: dict[str, Any], text: str) -> None:
    good = state(task="seg", config={}, meta={})
    save(tmp_path / "a.pt", good)
    assert load_trained(tmp_path / "a.pt", "seg")["task"] == "seg"
    save(tmp_path / "a.pt", {**good, **part})
    with pytest.raises(UserError, match=f"a.pt: {text}"):
        load_trained(tmp_path / "a.pt", "seg")


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("weight", 3, "weight: found a int among the weights, expected tensors by name"),
        (7, torch.zeros(2), "7: found the name 7 among the weights"),
        (
            "weight",
            torch.zeros(2, 2).to_sparse(),
            "weight: found a tensor of layout torch.sparse_coo, expected a dense",
        ),
        (
            "weight",
            torch.zeros(2, 2, dtype=torch.complex64),
            "weight: found numbers of type torch.complex64, expected",
        ),
        ("weight", torch.zeros(2, 2, dtype=torch.int32), "weight: found numbers of type torch.int32, expected"),
    ],
)
def test_weights_that_are_none(name: Any, value: Any, text: str) -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(UserError, match=f"w.pt: {text}"):
        load_weights(model, {**model.state_dict(), name: value}, "w.pt")


def test_zip_that_is_no_checkpoint(tmp_path: Path) -> None:
    import zipfile

    with zipfile.ZipFile(tmp_path / "a.pt", "w") as file:
        file.writestr("a.txt", "hello")
    with pytest.raises(UserError, match=r"a.pt: the checkpoint is damaged: "):
        load(tmp_path / "a.pt")


def test_tensors_that_are_no_checkpoint_of_ours(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    torch.save({"conv.weight": torch.zeros(1)}, path)
    with pytest.raises(
        UserError, match=r"a.pt: found a dict with the keys conv.weight, expected a checkpoint written by"
    ):
        load(path)
    assert list(read(path)) == ["conv.weight"]
    torch.save([1], path)
    with pytest.raises(UserError, match=r"a.pt: found a list, expected a checkpoint"):
        load(path)
    torch.save(state(format=99), path)
    with pytest.raises(UserError, match=r"a.pt: a checkpoint of format 99, this version reads format 1"):
        load(path)
    incomplete = state()
    del incomplete["rng"], incomplete["scaler"]
    torch.save(incomplete, path)
    with pytest.raises(UserError, match=r"a.pt: the checkpoint lacks scaler, rng"):
        load(path)


def test_export(tmp_path: Path) -> None:
    weight = torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last)
    export_weights(tmp_path / "w.safetensors", {"a": weight, "same": weight})
    found = load_file(tmp_path / "w.safetensors")
    assert torch.equal(found["a"], weight) and torch.equal(found["same"], weight)
    assert torch.equal(read(tmp_path / "w.safetensors")["a"], weight)


def test_exported_weights_are_for_whoever_may_read_files_of_this_user(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    export_weights(tmp_path / "w.safetensors", {"a": torch.ones(2)})
    assert (tmp_path / "w.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode


# ---- weights of another network


def network(classes: int = 19, width: int = 4, normed: bool = True) -> nn.Sequential:
    layers = [nn.Conv2d(3, width, 3), nn.BatchNorm2d(width) if normed else nn.Identity(), nn.Conv2d(width, width, 3)]
    return nn.Sequential(*layers, nn.ReLU(), nn.Conv2d(width, classes, 1))


def mismatch(model: nn.Module, other: nn.Module) -> str:
    before = {name: one.clone() for name, one in model.state_dict().items()}
    with pytest.raises(UserError) as caught:
        load_weights(model, other.state_dict(), "runs/x/best.pt")
    assert all(torch.equal(one, before[name]) for name, one in model.state_dict().items())
    return str(caught.value)


def test_weights_that_fit() -> None:
    a, b = network(), network()
    load_weights(a, b.state_dict(), "x")
    assert all(torch.equal(one, b.state_dict()[name]) for name, one in a.state_dict().items())


def test_another_number_of_classes() -> None:
    assert mismatch(network(19), network(11)).splitlines() == [
        "runs/x/best.pt: these weights are of another network than Sequential",
        "  2 of another shape:",
        "    4.weight: here (19, 4, 1, 1), in the file (11, 4, 1, 1)",
        "    4.bias: here (19,), in the file (11,)",
        "  only the last layers differ: probably another number of classes",
    ]


def test_images_of_other_channels() -> None:
    gray = network()
    gray[0] = nn.Conv2d(1, 4, 3)
    told = "the first layer takes images of 1 channels here, of 3 in the file: check the data set"
    assert mismatch(gray, network()).splitlines()[-1].strip() == told


def test_other_blocks() -> None:
    deconvolved = [network() for _ in range(2)]
    for block, one in zip((2, 4), deconvolved, strict=True):
        norm.convert(one, "deconv", block=block, last_block=block)
    told = "only the whitening differs: check norm.block, norm.grouping and norm.overrides"
    assert mismatch(*deconvolved).splitlines()[-1].strip() == told


def test_another_norm() -> None:
    text = mismatch(network(normed=False), network())
    assert "  5 unexpected in the file:\n    1.weight\n" in text
    assert text.endswith("whole layers are of another kind: check norm.name and its options, then model.name")


def test_another_model_lists_ten_and_counts() -> None:
    text = mismatch(nn.Sequential(*[nn.Linear(2, 2) for _ in range(8)]), nn.ModuleDict({"a": nn.Linear(2, 2)}))
    assert "  16 missing in the file:\n    0.weight\n" in text and "    ... and 6 more\n" in text
    assert text.count("\n    ") == 10 + 1 + 2
    assert text.endswith("check model.name and its options")


def test_files_older_than_the_batch_counter_load() -> None:
    """torchvision's first ImageNet weights have no num_batches_tracked."""
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    state = {name: value + 1 for name, value in model.state_dict().items() if "num_batches" not in name}
    load_weights(model, state, "old.pth")
    assert torch.equal(model[1].running_mean, torch.ones(4)) and int(model[1].num_batches_tracked) == 0


def test_layers_that_ask_for_the_version_of_their_weights(tmp_path: Path) -> None:
    class Versioned(nn.Linear):  # as torchvision's MNASNet
        _version = 2

        def _load_from_state_dict(self, state: Any, prefix: str, metadata: Any, *rest: Any) -> None:
            if metadata.get("version") != 2:
                raise ValueError(f"version should be 2 instead of {metadata.get('version')}")
            super()._load_from_state_dict(state, prefix, metadata, *rest)

    source, model = (nn.Sequential(Versioned(2, 3)) for _ in range(2))
    save(tmp_path / "x.pt", {"model": source.state_dict()})
    export_weights(tmp_path / "x.safetensors", source.state_dict())
    for state in (read(tmp_path / "x.pt")["model"], read(tmp_path / "x.safetensors")):
        model[0].weight.data.zero_()
        load_weights(model, state, "x")
        assert torch.equal(model[0].weight, source[0].weight)


def test_the_checksum_is_of_the_file_that_was_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, steps = tmp_path / "best.pt", iter(range(2, 9))

    def replaced(*given: Any) -> dict[str, Any]:
        found = load_trained(*given)
        if (step := next(steps)) <= last:
            save(path, trained(step))
        return found

    def trained(step: int) -> dict[str, Any]:
        return state(task="seg", config={}, meta={}, step=step)

    monkeypatch.setattr(checkpoint, "load_trained", replaced)
    for last in (0, 3):  # a training replaces it never, twice, and always
        save(path, trained(1))
        found, digest = load_identified(path, "seg")
        assert digest == hashlib.sha256(path.read_bytes()).hexdigest()
        assert found["step"] == load(path)["step"] == max(1, last)
        steps = iter(range(2, 9))
    last = 9
    with pytest.raises(UserError, match=r"best\.pt: the checkpoint is replaced faster than it can be read; copy it"):
        load_identified(path, "seg")
    with pytest.raises(UserError, match="none.pt: cannot read the checkpoint: No such file"):
        load_identified(tmp_path / "none.pt", "seg")
