"""The batch scripts: bash that parses, short enough to read, every flag one that tldist has."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from tldist_launcher.arguments import flag_types

SCRIPTS = sorted((Path(__file__).parents[2] / "slurm").glob("*.sbatch"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_sound(script: Path) -> None:
    assert subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True).stderr == ""
    text = script.read_text()
    assert len(text.splitlines()) < 60
    used = set(re.findall(r"--(?:launch|data|train|strategy|run)[.a-z-]+", text))
    assert used
    assert used <= set(flag_types())


def test_there_is_one() -> None:
    assert [script.name for script in SCRIPTS] == ["train.sbatch"]
