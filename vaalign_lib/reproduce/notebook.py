"""What a notebook of the study needs around its argument: sizes, random numbers, and where results go.

A notebook run writes beside its figures folder: `figures/NAME.png` and `.pdf`, `tables/NAME.parquet`
and `.md`, and `findings.json`, from which the scoreboard is made. The same results give the same
bytes.
"""

import hashlib
import json
import logging
import os
import re
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from IPython.core.getipython import get_ipython
from IPython.display import Image, Markdown, display
from matplotlib.figure import Figure
from pandas.io.formats.style import Styler

from vaalign_lib.jobs import check_workers
from vaalign_lib.papers.printed import Finding, printed_text, rule_of, rules, verdict
from vaalign_lib.profiles import Profile, Study, load_profile
from vaalign_lib.statistics.tests import Estimate, rounded
from vaalign_lib.store import RUNS, RunStore, write_atomically

SIGNIFICANT_DIGITS = 10  # of tables; what lies below differs between processors


@dataclass
class NotebookRun:
    """One run of one notebook.

    Attributes:
        name: of the notebook.
        profile: its sizes.
        seed: of the study.
        run_dir: the run folder.
        figures_dir: where figures go; tables and findings go beside it.
        workers: processes of this machine for long work.
        cluster: address of a dask scheduler that takes the longest work instead; empty: none.
    """

    name: str
    profile: Profile
    seed: int
    run_dir: Path
    figures_dir: Path
    workers: int
    cluster: str = ""
    _figures: list[dict[str, str]] = field(default_factory=list)
    _tables: list[dict[str, str]] = field(default_factory=list)
    _findings: dict[str, Finding] = field(default_factory=dict)

    @property
    def store(self) -> RunStore:
        """The run store, shared by all notebooks of the run folder."""
        return RunStore(self.run_dir / "store")

    @property
    def study(self) -> Study:
        """Store, profile and seed, as experiments take them."""
        return Study(self.store, self.profile, self.seed)

    def seed_of(self, name: str) -> int:
        """Return a seed of its own for every named part of the notebook, from the study's seed."""
        digest = hashlib.sha256(f"{self.seed}/{self.name}/{name}".encode()).digest()
        return int.from_bytes(digest[:4], "big")

    def rng(self, name: str) -> np.random.Generator:
        """Return the random generator of a named part, independent of the others and their order."""
        return np.random.default_rng(self.seed_of(name))

    def save_figure(self, figure: Figure, name: str, *, item: str, caption: str) -> None:
        """Write a figure as PNG and PDF and show it; `item` says to what part of the paper it belongs."""
        self.figures_dir.mkdir(parents=True, exist_ok=True)
        label = f"{caption} ({self.name}, profile {self.profile.name})"
        png: dict[str, Any] = {"Software": None, "Title": item, "Description": label}
        pdf: dict[str, Any] = {"CreationDate": None, "Producer": None, "Creator": None}
        figure.savefig(self.figures_dir / f"{name}.png", dpi=200, metadata=png)
        with mpl.rc_context({"pdf.fonttype": 42}):  # fonts as such, which journals ask for
            pdf |= {"Title": item, "Subject": label}
            figure.savefig(self.figures_dir / f"{name}.pdf", metadata=pdf)
        self._figures.append({"name": name, "item": item, "caption": caption})
        if get_ipython() is not None:
            display(Image(self.figures_dir / f"{name}.png", retina=True, alt=caption))
        self._write_record()

    def save_table(
        self, table: pd.DataFrame, name: str, *, item: str, caption: str, layout: pd.DataFrame | None = None
    ) -> pd.DataFrame:
        """Write a table as parquet and Markdown, rounded to ten significant digits, and return it.

        Args:
            table: numbers, for programs.
            name: of the files.
            item: of the paper.
            caption: of the table.
            layout: the same as text, for readers: then Markdown shows it, and LaTeX (booktabs) as well.
        """
        rounded_table = table.map(partial(rounded, digits=SIGNIFICANT_DIGITS))
        arrow = pa.Table.from_pandas(rounded_table, preserve_index=False)
        label = {"item": item, "caption": caption, "notebook": self.name, "profile": self.profile.name}
        arrow = arrow.replace_schema_metadata((arrow.schema.metadata or {}) | label)
        folder = self.figures_dir.parent / "tables"
        folder.mkdir(parents=True, exist_ok=True)
        pq.write_table(arrow, folder / f"{name}.parquet")
        shown = rounded_table if layout is None else layout
        text = shown.to_markdown(index=False, floatfmt=".4g")
        write_atomically(
            folder / f"{name}.md", f"**{item}.** {caption} Profile: {self.profile.name}.\n\n{text}\n"
        )
        if layout is not None:
            told = f"{caption} Profile: {self.profile.name}."
            write_atomically(folder / f"{name}.tex", latex(layout, told, name))
        self._tables.append({"name": name, "item": item, "caption": caption})
        self._write_record()
        return rounded_table

    def finding(
        self,
        rule: str,
        reproduced: str,
        *,
        estimate: Estimate | None = None,
        holds: bool | np.bool_ | None = None,
    ) -> str:
        """Record what was found about a rule of `data/verdict_rules.yaml` and return the verdict.

        Args:
            rule: its id.
            reproduced: the finding in words and numbers, for the scoreboard.
            estimate: the number and its interval, where the rule compares numbers.
            holds: whether the statement is true, where the rule asks for one.
        """
        interval = (
            {}
            if estimate is None
            else {
                "value": rounded(estimate.value, SIGNIFICANT_DIGITS),
                "low": rounded(estimate.low, SIGNIFICANT_DIGITS),
                "high": rounded(estimate.high, SIGNIFICANT_DIGITS),
                "count": estimate.count,
            }
        )
        found = Finding(
            rule=rule, reproduced=reproduced, holds=None if holds is None else bool(holds), **interval
        )
        judged = verdict(rule_of(rule), found)
        self._findings[rule] = found
        self._write_record()
        return judged

    def scoreboard(self) -> pd.DataFrame:
        """Return the notebook's rows of the scoreboard: item, claim, ours, verdict."""
        rows = [
            {
                "item": rule.item,
                "claim": rule.claim if rule.source == "printed" else f"({rule.source}) {rule.claim}",
                "printed": printed_text(rule),
                "found": self._findings[rule.id].reproduced if rule.id in self._findings else "",
                "verdict": verdict(rule, self._findings.get(rule.id)),
            }
            for rule in rules().values()
            if rule.notebook == self.name
        ]
        return pd.DataFrame(rows)

    def _write_record(self) -> None:
        record = {
            "notebook": self.name,
            "profile": self.profile.name,
            "seed": self.seed,
            "figures": self._figures,
            "tables": self._tables,
            "findings": [finding.model_dump() for finding in self._findings.values()],
        }
        write_atomically(self.figures_dir.parent / "findings.json", json.dumps(record, indent=1) + "\n")


_LATEX = {
    "σ₁²": r"$\sigma_1^2$",
    "σ₂²": r"$\sigma_2^2$",
    "μ₁": r"$\mu_1$",
    "μ₂": r"$\mu_2$",
    "p̂₁": r"$\hat{p}_1$",
    "p̂₂": r"$\hat{p}_2$",
}


def latex(layout: pd.DataFrame, caption: str, label: str) -> str:
    """Return a table of texts for LaTeX with booktabs; Greek headings become formulas."""
    escaped = layout.rename(columns=str).to_latex(
        index=False, escape=True, caption=_escaped(caption), label=f"tab:{label}", position="htbp"
    )
    for text, formula in _LATEX.items():
        escaped = escaped.replace(text, formula)
    return escaped


def _escaped(text: str) -> str:
    return re.sub(r"([&%$#_{}])", r"\\\1", text)


# --- texts of others ----------------------------------------------------------------------------------


def quoted(text: str) -> str:
    """Return a text of others for Markdown, in which nothing of it is markup, HTML or a formula."""
    return "".join(
        character if character.isalnum() or character == " " else f"&#{ord(character)};"
        for character in " ".join(text.split())
    )


def _show_texts_as_texts() -> None:
    """Escape HTML wherever tables and Markdown are shown, which may hold names that are not ours."""
    pd.set_option("styler.format.escape", "html")
    if (shell := get_ipython()) is not None and shell.display_formatter is not None:
        formatters = shell.display_formatter.formatters
        formatters["text/html"].for_type(Styler, _table_html)
        formatters["text/markdown"].for_type(Markdown, _without_tags)


def _table_html(table: Styler) -> str:
    return table.format_index(escape="html").format_index(escape="html", axis="columns").to_html()


def _without_tags(text: Markdown) -> str:
    return re.sub(r"<(?=[A-Za-z/!?])", "&lt;", str(text.data))


def start(
    name: str,
    *,
    profile: str = "embedded",
    seed: int = 0,
    run_dir: str | Path = "",
    figures_dir: str | Path = "",
    workers: int | str = 0,
) -> NotebookRun:
    """Begin a notebook with its parameters.

    Args:
        name: of the notebook, without its ending.
        profile: a name or the path of a YAML file.
        seed: of the whole study.
        run_dir: run folder; empty means runs/<profile> of the project.
        figures_dir: folder of the figures; tables and findings go beside it. Empty means
            <run_dir>/interactive/<name>/figures, apart from what `vaalign reproduce` made.
        workers: processes for long work, 0 means one per core; or the address of a dask scheduler,
            whose workers train the policies.

    Raises:
        ProfileError, ValueError: a parameter is not allowed.
    """
    loaded = load_profile(profile)
    if not isinstance(seed, int) or seed < 0:
        raise ValueError(f"seed: expected a whole number of at least 0, got {seed!r}")
    check_workers(workers, least=0)
    logging.basicConfig(level=logging.WARNING)
    _show_texts_as_texts()
    mpl.rcdefaults()  # figures do not follow the user's matplotlibrc
    folder = Path(run_dir) if run_dir else RUNS / loaded.name
    return NotebookRun(
        name=name,
        profile=loaded,
        seed=seed,
        run_dir=folder,
        figures_dir=Path(figures_dir) if figures_dir else folder / "interactive" / name / "figures",
        workers=(workers if isinstance(workers, int) else 0) or os.cpu_count() or 1,
        cluster=workers if isinstance(workers, str) else "",
    )
