"""Executing one notebook headless, in this very interpreter, to a copy with outputs and a clean page."""

import html
import logging
import re
import subprocess
import sys
from base64 import b64encode
from contextlib import AbstractContextManager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from xml.etree import ElementTree

import bleach
import nbformat
import papermill
from jinja2 import pass_context
from jupyter_client.kernelspec import NATIVE_KERNEL_NAME, KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from latex2mathml.converter import Converter
from nbconvert import HTMLExporter
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath
from tqdm import tqdm
from traitlets import default

from vaalign_lib.jobs import ENVIRONMENT, HEADLESS
from vaalign_lib.store import write_atomically

EXECUTED, PAGE, FINDINGS = "executed.ipynb", "page.html", "findings.json"  # in the folder of a run
POLICY = (Path(__file__).parent / "templates" / "policy.html").read_text(encoding="utf-8")
_NARROW = (  # on a telephone what is wide scrolls by itself, not the page
    "<style>.jp-RenderedHTMLCommon, .jp-OutputArea-output { overflow-x: auto; }"
    " :not(pre) > code { overflow-wrap: anywhere; white-space: normal; }</style>"
)

_SHOWN = {"text/html", "text/markdown", "text/latex", "text/plain", "image/png", "image/jpeg"}
_TEXT = "a abbr b blockquote br caption code dd del div dl dt em h1 h2 h3 h4 h5 h6 hr i li ol p pre s"
_TABLE = "span strong sub sup table tbody td tfoot th thead tr u ul"
_MATH = (
    "math menclose merror mfrac mi mmultiscripts mn mo mover mpadded mphantom mroot mrow ms mspace "
    "msqrt mstyle msub msubsup msup mtable mtd mtext mtr munder munderover"
)
_ANYWHERE = ["class", "id", "colspan", "rowspan", "align", "start"]
_OF_MATH = (
    "accent accentunder columnalign columnspacing depth display displaystyle fence form height "
    "largeop linethickness lspace mathsize mathvariant maxsize minsize movablelimits notation rowspacing "
    "rspace scriptlevel separator stretchy symmetric voffset width xmlns"
)
_BANNER = (
    '<p style="margin: 0; padding: .6rem 1rem; background: #e69f00; color: #000"><strong>{}</strong></p>'
)
_ATTRIBUTES = {"*": _ANYWHERE, "a": ["href", "title"], **{name: _OF_MATH.split() for name in _MATH.split()}}


def cleaned(fragment: str) -> str:
    """Return HTML in which nothing runs or loads; what is not allowed is shown as text."""
    unstyled = re.sub(r"<style\b.*?</style>", "", fragment, flags=re.DOTALL)  # those of tables
    tags = f"{_TEXT} {_TABLE} {_MATH}".split()
    return bleach.clean(unstyled, tags, _ATTRIBUTES, {"http", "https", "mailto"})


def formula(latex: str, display: str) -> str:
    """Return LaTeX as MathML, which browsers draw by themselves; as it is if it cannot be read."""
    if re.search(r"\\(def|(re)?newcommand)\b", latex):  # may grow without end
        return html.escape(latex)
    try:
        tree = Converter(display=display).convert_to_element(latex.strip())
    except Exception:  # it has many, for what writers of LaTeX get wrong
        return html.escape(latex)
    for element in tree.iter():
        element.text = html.unescape(element.text or "")  # it has entities, which are escaped below
        element.tail = html.unescape(element.tail or "")
        element.attrib = {name: html.unescape(value) for name, value in element.attrib.items()}
    return ElementTree.tostring(tree, encoding="unicode", short_empty_elements=False)


class _Renderer(IPythonRenderer):
    def inline_math(self, body: str) -> str:
        return formula(body, "inline")

    def block_math(self, body: str) -> str:
        return formula(body, "block")


class OfflineHTMLExporter(HTMLExporter):
    """nbconvert's page without the scripts and fonts that it would load from elsewhere."""

    @pass_context
    def markdown2html(self, context: Any, source: str) -> str:
        renderer = _Renderer(escape=False, exclude_anchor_links=True)
        return cleaned(MarkdownWithMath(renderer=renderer).render(source))


def _without_foreign_output(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Return a copy whose outputs are of kinds that run nothing, with clean HTML."""
    copy = nbformat.from_dict(notebook)
    copy.metadata.pop("widgets", None)
    copy.cells = [cell for cell in copy.cells if cell.cell_type != "raw"]
    for cell in copy.cells:
        for output in cell.get("outputs", []):
            for kind in set(output.get("data", {})) - _SHOWN:
                del output.data[kind]
            if "text/html" in output.get("data", {}):
                output.data["text/html"] = cleaned(output.data["text/html"])
        if cell.cell_type == "code":
            cell.outputs = [one for one in cell.outputs if one.get("data", one)]
    return copy


def write_page(
    notebook: nbformat.NotebookNode, path: Path, title: str, banner: str = "", code: bool = True
) -> None:
    """Write an executed notebook, with its code or not, as one self-contained HTML file, below a banner."""
    exporter = OfflineHTMLExporter(  # type: ignore[no-untyped-call]
        mathjax_url="", require_js_url="", jquery_url="", mermaid_js_url="", exclude_input=not code
    )
    shown = _without_foreign_output(notebook)
    page, _ = exporter.from_notebook_node(shown, resources={"metadata": {"name": title}})
    page = re.sub(r"<script\b.*?</script>", "", page, flags=re.DOTALL)  # nbconvert's own
    page = page.replace("<head>", f"<head>{POLICY.strip()}", 1).replace("</head>", f"{_NARROW}</head>", 1)
    if banner:
        page = re.sub(
            r"<body\b[^>]*>", lambda body: f"{body[0]}{_BANNER.format(html.escape(banner))}", page, count=1
        )
    write_atomically(path, page)


def write_answer(markdown: Path, picture: Path | None = None) -> Path:
    """Write a page of Markdown, and a picture below it, as one self-contained HTML file beside it."""
    text = re.sub(r"^!\[.*?\]\(.*?\)$", "", markdown.read_text(encoding="utf-8"), flags=re.M)
    cells = [nbformat.v4.new_markdown_cell(text)]
    if picture is not None:
        shown = {"image/png": b64encode(picture.read_bytes()).decode()}
        output = nbformat.v4.new_output("display_data", shown)
        cells.append(nbformat.v4.new_code_cell("", outputs=[output]))
    page = markdown.with_suffix(".html")
    title = text.partition("\n")[0].removeprefix("# ")
    write_page(nbformat.v4.new_notebook(cells=cells), page, title, code=False)
    return page


def execute(
    notebook: Path, folder: Path, parameters: dict[str, Any], run_dir: Path, label: str, banner: str = ""
) -> str | None:
    """Execute a notebook with papermill into a folder; return the error in a few lines, if any."""
    target = folder / EXECUTED
    # papermill fills in single braces
    literal = [re.sub("([{}])", r"\1\1", str(path)) for path in (notebook, target)]
    paths = {"run_dir": str(run_dir), "figures_dir": str(folder / "figures")}
    error = None
    logging.getLogger("asyncio").setLevel(
        logging.CRITICAL
    )  # what tasks of an ended kernel say when collected
    with _InnerBars() as bars, TemporaryDirectory() as nobody:
        try:
            papermill.execute_notebook(
                *literal,
                parameters=parameters | paths,
                kernel_name=NATIVE_KERNEL_NAME,
                kernel_manager_class=_ThisInterpreter,
                cwd=notebook.parent,
                progress_bar={"desc": label, "file": sys.stderr, "leave": False, "position": 0},
                stderr_file=bars,
                log_output=False,
                coalesce_streams=True,
                extra_arguments=[
                    "--IPKernelApp.log_level=40",
                    f"--IPKernelApp.ipython_dir={nobody}",  # not the user's, with their startup files
                ],
            )
        except papermill.PapermillExecutionError as failure:
            error = f"cell {failure.exec_count}: {failure.ename}: {_shortened(failure.evalue)}"
        except Exception as failure:  # the kernel died or never started; the other notebooks go on
            error = f"{type(failure).__name__}: {_shortened(str(failure))}"
    try:
        executed = nbformat.read(target if target.is_file() else notebook, as_version=4)
        _without_bars(executed.cells)
        nbformat.write(executed, target)
        write_page(executed, folder / PAGE, notebook.stem, banner)
    except Exception as failure:
        error = error or f"page: {type(failure).__name__}: {_shortened(str(failure))}"
    return error


class _ThisInterpreter(AsyncKernelManager):
    """Starts the interpreter that runs, whatever kernels are installed under its name, and tells it that
    nobody watches; what the process says when it is ended is for nobody: messages of cells come otherwise.
    """

    @default("kernel_spec_manager")
    def _native_only(self) -> KernelSpecManager:
        return KernelSpecManager(kernel_dirs=[])

    async def _async_launch_kernel(self, kernel_cmd: list[str], **options: Any) -> None:
        options |= {"stderr": subprocess.DEVNULL, "env": ENVIRONMENT | options["env"] | {HEADLESS: "1"}}
        await super()._async_launch_kernel(kernel_cmd, **options)


def _shortened(text: str) -> str:
    return "\n    ".join(text.strip().splitlines()[:5])


class _InnerBars(AbstractContextManager["_InnerBars"]):
    """A file that shows the progress bars which a notebook writes to its stderr, below its own line."""

    def __init__(self) -> None:
        self._bar = tqdm(
            total=0, file=sys.stderr, disable=None, bar_format="    {desc}", position=1, leave=False
        )

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def write(self, text: str) -> None:
        if shown := [part.strip() for part in re.split(r"[\r\n]", text) if part.strip()]:
            self._bar.set_description_str(shown[-1][:110])

    def flush(self) -> None:
        self._bar.refresh()


def _without_bars(cells: list[Any]) -> None:
    """Drop what was overwritten on the terminal, that is, everything up to the last carriage return."""
    for cell in cells:
        for output in cell.get("outputs", []):
            if output.output_type == "stream" and output.name == "stderr":
                output.text = re.sub(r"[^\n]*\r", "", output.text).strip()
        if cell.cell_type == "code":
            cell.outputs = [out for out in cell.outputs if out.get("text") != ""]
