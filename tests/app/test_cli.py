"""The command as a person meets it: help, exit codes, one line for a mistake, nothing heavy."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from app import verb as verbs
from infra.errors import UserError

ROOT = Path(__file__).resolve().parent.parent.parent
VERBS = (
    "doctor", "up", "down", "plan", "run", "curate", "train", "status", "sample", "edit", "verify",
    "diff", "score", "refilter", "search", "promote", "rollback", "lineage",
)  # fmt: skip
HEAVY = ("torch", "ray", "pyspark", "mlflow", "lightning", "pyarrow", "polars", "numpy", "PIL")


def atelier(
    *arguments: str, home: Path | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    variables = {**os.environ, "PYTHONDONTWRITEBYTECODE": "", **environment}
    if home is not None:
        variables["ATELIER_HOME"] = str(home)
    return subprocess.run(
        [sys.executable, "-c", "from app.cli import main; main()", *arguments],
        cwd=ROOT,
        env=variables,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_teaches(verb: str) -> None:
    done = atelier(verb, "--help")
    assert done.returncode == 0
    assert f"atelier {verb}" in done.stdout.partition("Examples")[2]
    assert "--json" in done.stdout


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\nsys.argv[1:] = ['--help']\nfrom app.cli import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        f"print('HEAVY', [name for name in {HEAVY} if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "HEAVY []" in done.stdout
    assert all(verb in done.stdout for verb in VERBS)


@pytest.mark.parametrize(
    "arguments",
    [("rnu",), ("run",), ("down", "--jsno"), ("sample",), ("sample", "x", "--steps", "no"), ()],
)
def test_bad_usage_is_exit_code_two(arguments: tuple[str, ...]) -> None:
    done = atelier(*arguments)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


def test_a_misspelt_verb_is_guessed() -> None:
    assert "Did you mean 'run'?" in atelier("rnu").stderr


def test_a_mistake_is_one_line_and_exit_code_one(tmp_path: Path) -> None:
    done = atelier("run", "recipes/dmo.yaml", home=tmp_path)
    assert done.returncode == 1
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    assert lines == ["atelier: no recipe at recipes/dmo.yaml; did you mean recipes/demo.yaml?"]
    assert list(tmp_path.iterdir()) == []


def test_three_mistakes_are_three_lines(tmp_path: Path) -> None:
    sets = ["--set", "stages.concepts.stepz=3", "--set", "seed=x", "--set", "worlds={}"]
    done = atelier("run", "tests/recipes/tiny.yaml", *sets, "--json", home=tmp_path)
    assert done.returncode == 1
    lines = done.stderr.splitlines()
    assert len(lines) == 3
    assert "did you mean steps?" in done.stderr
    assert json.loads(done.stdout) == {"error": [line.removeprefix("atelier: ") for line in lines]}


@pytest.mark.parametrize("verb", ["status", "verify"])
def test_before_the_first_run_there_is_nothing_to_see(verb: str, tmp_path: Path) -> None:
    done = atelier(verb, home=tmp_path)
    assert done.returncode == 1
    assert "try `atelier run recipes/demo.yaml`" in done.stderr


def test_a_dataset_that_is_not_there_is_one_problem(tmp_path: Path) -> None:
    uri = f"{tmp_path.as_uri()}/d/v/manifest.json"
    done = atelier("verify", uri, "--json", home=tmp_path)
    assert done.returncode == 1
    answer = json.loads(done.stdout)
    assert not answer["ok"]
    assert len(answer["problems"]) == 1


def test_painting_needs_a_model(tmp_path: Path) -> None:
    done = atelier("sample", "a fox", "--out", str(tmp_path / "a.png"), home=tmp_path)
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)
    done = atelier("sample", "a fox", "--model", str(tmp_path), home=tmp_path)
    assert "expected a model folder with model_index.json" in done.stderr


def test_down_stops_nothing_when_nothing_runs(tmp_path: Path) -> None:
    done = atelier("down", "--json", home=tmp_path)
    assert json.loads(done.stdout) == {"stopped": []}


def test_doctor_answers_as_json(tmp_path: Path) -> None:
    done = atelier("doctor", "--json", home=tmp_path)
    checks = {check["name"]: check for check in json.loads(done.stdout)["checks"]}
    assert {"python", "java", "packages", "disk", "memory", "rclone", "s3"} <= set(checks)
    assert checks["python"]["ok"]
    assert done.returncode == (0 if all(check["ok"] for check in checks.values()) else 1)


def test_doctor_sees_a_taken_port_and_open_keys(tmp_path: Path) -> None:
    import socket

    (tmp_path / "services").mkdir(mode=0o700)
    keys = tmp_path / "services" / "credentials.json"
    keys.write_text("{}", encoding="utf-8")
    keys.chmod(0o644)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = str(listener.getsockname()[1])
        done = atelier("doctor", "--json", home=tmp_path, ATELIER_S3_PORT=port)
    assert done.returncode == 1
    checks = {check["name"]: check for check in json.loads(done.stdout)["checks"]}
    assert f"{port} is taken by" in checks["ATELIER_S3_PORT"]["found"]
    assert checks["credentials.json mode"]["remedy"] == f"run chmod 600 {keys}"


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (UserError("a line"), ["a line"]),
        (OSError(28, "No space left on device", "/x"), ["the disk of /x is full"]),
        (BrokenPipeError(), []),
        (ValueError("a bug"), None),
    ],
)
def test_what_is_a_persons_mistake(error: Exception, expected: list[str] | None) -> None:
    lines = verbs.lines_of(error)
    if expected is None or not expected:
        assert lines == expected
    else:
        assert lines is not None
        assert lines[0].startswith(expected[0])


def test_ctrl_c_says_that_it_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    import typer

    @verbs.verb
    def interrupted() -> None:
        raise KeyboardInterrupt

    with pytest.raises(typer.Exit) as caught:
        interrupted()
    assert caught.value.exit_code == 130
    assert "the same command goes on" in capsys.readouterr().err


def test_ctrl_c_while_it_imports_is_one_line() -> None:
    code = (
        "import signal, sys\n"
        "class Slow:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'typer':\n"
        "            signal.raise_signal(signal.SIGINT)\n"
        "sys.meta_path.insert(0, Slow())\n"
        "from app.__main__ import main\n"
        "main()"
    )
    command = [sys.executable, "-c", code, "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr == "\natelier: stopped before it began\n"


def test_a_module_is_the_command() -> None:
    command = [sys.executable, "-m", "app", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("Usage: python -m app")
    assert "atelier run recipes/demo.yaml" in done.stdout


def test_sigterm_has_its_own_exit_code() -> None:
    import signal

    import typer

    @verbs.verb
    def terminated() -> None:
        signal.raise_signal(signal.SIGTERM)

    @verbs.verb
    def terminated_in_ray() -> None:
        try:
            signal.raise_signal(signal.SIGTERM)
        except KeyboardInterrupt:
            raise KeyboardInterrupt from None  # as Ray does

    @verbs.verb
    def interrupted() -> None:
        raise KeyboardInterrupt

    for run, code in ((terminated, 143), (terminated_in_ray, 143), (interrupted, 130)):
        with pytest.raises(typer.Exit) as caught:
            run()
        assert caught.value.exit_code == code
