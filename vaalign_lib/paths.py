"""Where the study's files lie. The notebooks, inputs and results belong to a checkout of the project."""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = ROOT / "notebooks"
DATA = ROOT / "data"
PROFILES = DATA / "profiles"
RESULTS = DATA / "results"
FIGURES = ROOT / "figures"
RUNS = ROOT / "runs"
