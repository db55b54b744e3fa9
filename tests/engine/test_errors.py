"""How programs end with a mistake of the user's, and with several processes where one does the work."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from engine.errors import UserError, one_process, program

ROOT = Path(__file__).parents[2]


def run(monkeypatch: pytest.MonkeyPatch, rank: str | None, world: str | None) -> int:
    for name, value in (("RANK", rank), ("WORLD_SIZE", world)):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)

    @program
    def main() -> int:
        one_process("tools/x.py --y")
        return 7

    return main()


@pytest.mark.parametrize("rank, world", [(None, None), ("0", "1"), (None, "4"), ("0", "many")])
def test_a_single_process_works(monkeypatch: pytest.MonkeyPatch, rank: str | None, world: str | None) -> None:
    assert run(monkeypatch, rank, world) == 7


def test_of_several_the_first_tells_why_and_the_others_end(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "0", "3") == UserError.status
    assert capsys.readouterr().err == (
        "error (process 0): tools/x.py --y: works in one process, and torchrun has started 3; start it without "
        "torchrun: python tools/x.py --y ...\n"
    )
    with pytest.raises(SystemExit) as ended:
        run(monkeypatch, "1", "3")
    assert ended.value.code == 0 and capsys.readouterr() == ("", "")


def test_a_library_that_is_not_installed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "segmentation_models_pytorch", None)

    @program
    def main() -> int:
        import segmentation_models_pytorch  # noqa: F401

        return 0

    assert main() == UserError.status
    assert capsys.readouterr().err == (
        f"error: {sys.executable} has no module 'segmentation_models_pytorch', which this program needs. `make "
        "install` makes the environment .venv with all that is needed; `pip install -e .`, in the folder of README.md, "
        "installs it into another one.\n"
    )


def test_a_module_of_ours_that_is_not_there_is_a_bug() -> None:
    @program
    def main() -> int:
        import engine.no_such_file  # type: ignore[import-not-found]  # noqa: F401

        return 0

    with pytest.raises(ModuleNotFoundError):
        main()


def test_under_torchrun_itself() -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(ROOT / "tools/inspect.py"), "data.root=/nowhere"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 1 and done.stdout == ""  # torchrun's own status
    assert done.stderr.count("error (process") == 1
    assert "error (process 0): tools/inspect.py: works in one process, and torchrun has started 2" in done.stderr


PRINTING = """
import sys
from engine.errors import program

@program
def main():
    for _ in range(int(sys.argv[1])):
        print("words " * 20)
    return 0

sys.exit(main())
"""


OTHER_PIPE = """
from engine.errors import program

@program
def main():
    raise BrokenPipeError(32, "of a loader")

main()
"""


def test_a_standard_output_that_is_closed_is_no_failure() -> None:
    """A daemon's, say: what was done is done, and the status says so."""
    command = ["sh", "-c", 'exec "$@" >&-', "sh", sys.executable, "tools/train.py", "configs/seg/sample.yaml", "--show"]
    done = subprocess.run(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 0 and done.stderr == ""


@pytest.mark.parametrize("lines", [1, 3000])
def test_an_output_that_takes_no_more_is_one_line(lines: int) -> None:
    command = [sys.executable, "-c", PRINTING, str(lines)]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.stderr == "error: the standard output takes no more: No space left on device\n"
    assert done.returncode == UserError.status
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(command, cwd=ROOT, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


NAMES = r"""
from engine.errors import program

@program
def main():
    print("\u6771\u4eac.png, caf\udce9.png, \u00fc")
    return 0

raise SystemExit(main())
"""


@pytest.mark.parametrize("encoding, want", [("latin-1", "\\u6771\\u4eac.png, caf\\udce9.png, \u00fc"), ("utf-8", None)])
def test_characters_that_the_output_lacks_are_escaped(encoding: str, want: str | None) -> None:
    command = [sys.executable, "-c", NAMES]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, env={**os.environ, "PYTHONIOENCODING": encoding})
    found = done.stdout.decode(encoding)
    assert (done.returncode, done.stderr) == (0, b"")
    assert found == (want or "\u6771\u4eac.png, caf\\udce9.png, \u00fc") + "\n"


def test_another_error_of_the_system_is_not_taken_for_it() -> None:
    @program
    def main() -> int:
        raise OSError(5, "Input/output error")

    with pytest.raises(OSError, match="Input/output"):
        main()

    # another pipe than the output, whose reader is there
    done = subprocess.run([sys.executable, "-c", OTHER_PIPE], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "BrokenPipeError: [Errno 32] of a loader" in done.stderr
