"""What a notebook needs around its argument: sizes, random numbers, and where results go: `figures/NAME.png`
and `.pdf`, `tables/NAME.parquet` and `.md`, `findings.json`. The same results give the same bytes.
"""

import hashlib
import json
import logging
import re
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from IPython.core.getipython import get_ipython
from IPython.display import Image, Markdown, display
from matplotlib.figure import Figure
from pandas.io.formats.style import Styler

from vaalign_lib.jobs import check_workers, default_workers
from vaalign_lib.papers.printed import Finding, meanings, printed_text, rule_of, rules, verdict
from vaalign_lib.profiles import LARGEST_SEED, Profile, Study, load_profile
from vaalign_lib.statistics.tests import Estimate, rounded
from vaalign_lib.store import RUNS, RunStore, write_atomically

SIGNIFICANT_DIGITS = 10  # of tables; what lies below differs between processors
_round = partial(rounded, digits=SIGNIFICANT_DIGITS)


@dataclass
class NotebookRun:
    """One run of one notebook.

    Attributes:
        study: the run store, shared by all notebooks of a run folder, the profile and the seed.
        figures_dir: where figures go; tables and findings go beside it.
        workers: processes of this machine for long work.
        cluster: address of a dask scheduler that takes the longest work instead; empty: none.
    """

    name: str
    study: Study
    run_dir: Path
    figures_dir: Path
    workers: int
    cluster: str = ""
    _made: dict[str, list[dict[str, str]]] = field(default_factory=lambda: {"figures": [], "tables": []})
    _findings: dict[str, Finding] = field(default_factory=dict)

    @property
    def profile(self) -> Profile:
        return self.study.profile

    @property
    def seed(self) -> int:
        return self.study.seed

    @property
    def store(self) -> RunStore:
        return self.study.store

    def seed_of(self, name: str) -> int:
        """Return a seed of its own for every named part of the notebook, from the study's seed."""
        digest = hashlib.sha256(f"{self.seed}/{self.name}/{name}".encode()).digest()
        return int.from_bytes(digest[:4], "big")

    def rng(self, name: str) -> np.random.Generator:
        """Return the random generator of a named part, independent of the others and their order."""
        return np.random.default_rng(self.seed_of(name))

    def save_figure(self, figure: Figure, name: str, *, item: str, caption: str) -> None:
        """Write a figure as PNG and PDF and show it; `item` says to what part of the paper it belongs."""
        path = self._record("figures", name, item, caption)
        label = f"{caption} ({self.name}, profile {self.profile.name})"
        png = {"Software": None, "Title": item, "Description": label}
        pdf = {"CreationDate": None, "Producer": None, "Creator": None, "Title": item, "Subject": label}
        figure.savefig(f"{path}.png", dpi=200, metadata=png)
        with mpl.rc_context({"pdf.fonttype": 42}):  # fonts as such, which journals ask for
            figure.savefig(f"{path}.pdf", metadata=pdf)
        if get_ipython() is not None:
            display(Image(f"{path}.png", retina=True, alt=caption))

    def save_table(
        self, table: pd.DataFrame, name: str, *, item: str, caption: str, layout: pd.DataFrame | None = None
    ) -> pd.DataFrame:
        """Write a table as parquet and Markdown, rounded to ten significant digits, and return it.

        With a layout, the same as text for readers, Markdown shows that, and LaTeX (booktabs) as well.
        """
        path = self._record("tables", name, item, caption)
        rounded_table = table.map(_round)
        arrow = pa.Table.from_pandas(rounded_table, preserve_index=False)
        label = {"item": item, "caption": caption, "notebook": self.name, "profile": self.profile.name}
        arrow = arrow.replace_schema_metadata((arrow.schema.metadata or {}) | label)
        pq.write_table(arrow, f"{path}.parquet")
        told = f"{caption} Profile: {self.profile.name}."
        text = (rounded_table if layout is None else layout).to_markdown(index=False, floatfmt=".4g")
        write_atomically(path.with_name(f"{name}.md"), f"**{item}.** {told}\n\n{text}\n")
        if layout is not None:
            write_atomically(path.with_name(f"{name}.tex"), latex(layout, told, name))
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
            estimate: the number and its interval, where the rule compares numbers; one that can tell whether
                it is `measurable` and is not decides nothing.
            holds: whether the statement is true, where the rule asks for one.
        """
        ends = ("value", "low", "high", "count")  # a ratio has more
        numbers = {} if estimate is None else {key: _round(getattr(estimate, key)) for key in ends}
        found = Finding(
            rule=rule,
            reproduced=reproduced,
            holds=None if holds is None else bool(holds),
            clear=getattr(estimate, "measurable", True),
            **numbers,
        )
        judged = verdict(rule_of(rule), found)
        self._findings[rule] = found
        self._write_record()
        return judged

    def scoreboard(self) -> pd.DataFrame:
        """Show what the notebook's verdicts mean; return its rows: item, claim, printed, found, verdict."""
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
        if get_ipython() is not None:
            display(Markdown(meanings(row["verdict"] for row in rows)))
        return pd.DataFrame(rows)

    def _record(self, kind: str, name: str, item: str, caption: str) -> Path:
        """Record a figure or table; return its path without ending."""
        folder = self.figures_dir if kind == "figures" else self.figures_dir.parent / kind
        folder.mkdir(parents=True, exist_ok=True)
        self._made[kind].append({"name": name, "item": item, "caption": caption})
        self._write_record()
        return folder / name

    def _write_record(self) -> None:
        about = {"notebook": self.name, "profile": self.profile.name, "seed": self.seed}
        findings = [finding.model_dump() for finding in self._findings.values()]
        record = about | self._made | {"findings": findings}
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
    caption = re.sub(r"([&%$#_{}])", r"\\\1", caption)
    options = {"caption": caption, "label": f"tab:{label}", "position": "htbp"}
    text = layout.rename(columns=str).to_latex(index=False, escape=True, **options)
    for greek, formula in _LATEX.items():
        text = text.replace(greek, formula)
    return text


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

    Results go to the run folder, runs/<profile> unless named; figures to `figures_dir`, tables and findings
    beside it, unless named to <run_dir>/interactive/<name>, apart from what `vaalign reproduce` made.
    Workers are processes for long work, 0 one per core, or the address of a dask scheduler.

    Raises:
        ProfileError, ValueError: a parameter is not allowed.
    """
    loaded = load_profile(profile)
    if not isinstance(seed, int) or not 0 <= seed <= LARGEST_SEED:
        raise ValueError(
            f"seed: expected a whole number of at least 0 and at most {LARGEST_SEED}, got {seed!r}"
        )
    check_workers(workers, least=0)
    logging.basicConfig(level=logging.WARNING)
    _show_texts_as_texts()
    pd.options.display.float_format = "{:.4g}".format
    mpl.rcdefaults()  # figures do not follow the user's matplotlibrc
    folder = Path(run_dir or RUNS / loaded.name)
    return NotebookRun(
        name=name,
        study=Study(RunStore(folder / "store"), loaded, seed),
        run_dir=folder,
        figures_dir=Path(figures_dir or folder / "interactive" / name / "figures"),
        workers=(workers if isinstance(workers, int) else 0) or default_workers(),
        cluster=workers if isinstance(workers, str) else "",
    )
