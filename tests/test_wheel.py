"""A wheel built from the repository works from another directory, conf/ and the embedded models included."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_an_installed_wheel_finds_its_config_and_models(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as packed:
        packed.extractall(site)
    environment = {**os.environ, "PYTHONPATH": str(site)}
    asked = [sys.executable, "-m", "moeprune", "--cfg", "job", "method=frequency"]
    answer = subprocess.run(asked, cwd=tmp_path, env=environment, check=True, capture_output=True, text=True)
    assert "WholeExpertsAllocator" in answer.stdout
    code = "import moeprune, moeprune.models.shape as s; print(moeprune.__file__, s.embedded_models())"
    found = [sys.executable, "-c", code]
    answer = subprocess.run(found, cwd=tmp_path, env=environment, check=True, capture_output=True, text=True)
    assert answer.stdout.startswith(str(site))
    assert "tiny_deepseek_v2" in answer.stdout and "tiny_qwen3_moe" in answer.stdout
