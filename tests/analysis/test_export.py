"""What a paper takes from results: tables, figures, the set-up and the sources."""

from __future__ import annotations

import re
import shutil
import subprocess
import zlib
from collections.abc import Mapping
from pathlib import Path

import pandas as pd
import pytest

from topkbench.analysis import style
from topkbench.analysis.export import latex, printed, sources
from topkbench.analysis.export.export_command import BEST, INTERVALS, _how_to_read, main
from topkbench.analysis.export.setup import sentences
from topkbench.analysis.record.store import Sweep, frame
from topkbench.analysis.tables.table import Table
from topkbench.tests.analysis.conftest import fill, make_row
from topkbench.tests.analysis.hostile import MARKDOWN, SCRIPT, sweep_of

ROOT = Path(__file__).parents[2]
METHODS = sorted(path.stem for path in (ROOT / "conf" / "method").glob("*.yaml"))
HOSTILE = r"\input{/etc/passwd} 100% $x$ a_b #1 & [2] * ~^ \\ <>|`" + '"'


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    results = tmp_path_factory.mktemp("exported") / "results"
    sweep = Sweep(results / "default" / "first", results)
    fill(sweep, ("hata", "quest"), (64, 512), (128,))
    assert main([str(sweep.folder)]) == 0
    return sweep.folder / "paper"


def test_everything_is_in_the_folder(exported: Path) -> None:
    names = {path.name for path in exported.iterdir()}
    assert names == {
        *("results.tex", "subtasks.tex", "setup.tex", "captions.tex", "sources.bib", "figures"),
    }
    figures = {path.name for path in (exported / "figures").iterdir()}
    assert {f"{name}-{width}in.pdf" for name in ("score_vs_k", "recall_vs_k", "score_vs_bytes")
            for width in ("3.3", "7")} <= figures  # fmt: skip
    assert {path.suffix for path in (exported / "figures").iterdir()} == {".pdf"}
    captions = (exported / "captions.tex").read_text()
    assert all(f"% {name}\n" in captions for name in figures)


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="needs pdflatex and bibtex")
def test_a_paper_that_takes_all_of_it_compiles_and_fits(exported: Path, tmp_path: Path) -> None:
    folder = tmp_path / "paper"
    shutil.copytree(exported, folder)
    figure = sorted((folder / "figures").glob("*-3.3in.pdf"))[0].name
    shown = [path.stem for path in sorted(folder.glob("*.tex")) if path.stem != "captions"]
    (folder / "main.tex").write_text(
        "\\documentclass[twocolumn]{article}\\usepackage{booktabs,graphicx}\\begin{document}\n"
        + "\n".join(f"\\input{{{name}}}" for name in shown)
        + f"\n\\begin{{figure}}\\includegraphics{{figures/{figure}}}\\end{{figure}}\n"
        "\\nocite{*}\\bibliographystyle{plain}\\bibliography{sources}\\end{document}\n"
    )
    compiler = ("pdflatex", "-interaction=nonstopmode", "-halt-on-error", "main.tex")
    for command in (compiler, ("bibtex", "main"), compiler, compiler):
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-2000:]
    log = (folder / "main.log").read_text(errors="replace")
    wide = [float(one) for one in re.findall(r"Overfull \\hbox \(([\d.]+)pt too wide\)", log)]
    assert max(wide, default=0.0) < 15  # a word of a sentence may stand out a little; no table does
    assert "undefined" not in log


def test_a_table_has_rules_small_intervals_and_the_best_in_bold(exported: Path) -> None:
    text = (exported / "results.tex").read_text()
    lines = text.splitlines()
    assert lines[0] == r"\begin{table*}[t]"
    for rule in (r"\toprule", r"\midrule", r"\bottomrule", r"\label{tab:results}"):
        assert rule in lines
    assert r"Method & k & rbit & Score (0--100) & $\Delta$ full (points) & Recall@k" in text
    bold = [line.split(" & ")[:2] for line in lines if r"\textbf{" in line]
    assert bold == [["HATA", "64"]]  # at 512, Quest's difference to it does not exclude 0
    quest = next(line for line in lines if line.startswith("Quest & 64 "))
    assert re.search(r"& \d+\.\d \{\\scriptsize \{\[\}\d+\.\d, \d+\.\d\{\]\}\}", quest)
    assert "−" not in text
    assert re.search(r"niah\\_single & niah\\_multikey", (exported / "subtasks.tex").read_text())


def objects_of(path: Path) -> tuple[bytes, bytes]:
    """Return a PDF file, and what its compressed streams say."""
    data = path.read_bytes()
    found = []
    for stream in re.findall(rb"stream\r?\n(.*?)\r?\nendstream", data, re.S):
        try:
            found.append(zlib.decompress(stream))
        except zlib.error:
            found.append(stream)
    return data, b"\n".join(found)


@pytest.mark.parametrize("width", printed.WIDTHS)
def test_figures_have_their_width_and_text_of_8_points_in_embedded_fonts(
    exported: Path, width: float
) -> None:
    paths = sorted((exported / "figures").glob(f"*-{width:g}in.pdf"))
    assert len(paths) >= 5
    for path in paths:
        data, content = objects_of(path)
        (box,) = re.findall(rb"/MediaBox \[ ([\d. ]+) \]", data)
        left, _, right, _ = map(float, box.split())
        assert right - left == pytest.approx(72 * width, abs=0.01), path
        assert b"/FontFile2" in data
        assert b"/Type3" not in data
        assert set(re.findall(rb"/F\d+ ([\d.]+) Tf", content)) == {b"8"}, path
        assert re.search(rb"T[jJ]\b", content)


def test_figures_on_a_screen_are_as_before() -> None:
    assert style.figure_size(7.2, 4.1) == (7.2, 4.1)
    assert style.rc_params() is style.RC_PARAMS
    with style.printed(3.3):
        assert style.figure_size(7.2, 4.0) == (3.3, 2.4)
        assert style.small_type(7) == 8
    assert style.print_width() is None


def test_a_figure_whose_type_does_not_fit_is_left_out_and_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A name of 60 characters leaves no space for the bars in 3.3 inches."""
    answers = {
        "full": [(100.0, "x")] * 4,
        "quest": [(50.0, "x")] * 4,
    }
    subtasks = tuple(f"sub_task_{place}_with_a_long_name" for place in range(4))
    sweep = sweep_of(tmp_path, answers, subtasks=subtasks)
    rows = sweep.rows()
    own = [
        make_row(**{**row, "subtask": name, "score": row["score"]})
        for row in rows[[*("run_id", "model", "task", "length", "method", "question", "score")]]
        .to_dict("records")
        for name in subtasks
    ]  # fmt: skip
    frame(own).to_parquet(tmp_path / "rows.parquet")
    assert main([str(tmp_path / "rows.parquet"), "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "Left out, as 8-point type does not fit: subtasks at 3.3 inches" in said
    assert not (tmp_path / "out" / "figures" / "subtasks-3.3in.pdf").exists()


# Text --------------------------------------------------------------------------------------------


def test_a_caption_explains_the_signs_that_its_table_has() -> None:
    plain = Table(["Method", "NLL"], [["a", "2.0"]])
    assert _how_to_read(plain) == []
    assert _how_to_read(Table(["Method", "NLL"], [["a", "2.0 [1.0, 3.0]"]])) == [INTERVALS]
    best = Table(["Method", "Score"], [["a", "2.0 [1.0, 3.0]"]], {(0, 1)})
    assert _how_to_read(best) == [INTERVALS, BEST]
    assert _how_to_read(Table(["Method", "qa_1"], [["a", "2.0"]], {(0, 1)})) == [BEST]


def test_signs_of_latex_are_shown_as_they_are() -> None:
    assert latex.latex("a_b & 50% of #1 {x} $y$") == r"a\_b \& 50\% of \#1 \{x\} \$y\$"
    assert latex.latex("\\input{x}") == r"\textbackslash{}input\{x\}"
    assert latex.latex("[2pt]*") == "{[}2pt{]}{*}"  # behind the end of a row
    assert latex.latex("−1 ≤ Δ × 2 †\n‡") == r"$-$1 $\leq$ $\Delta$ $\times$ 2 \dag{} \ddag{}"
    assert latex.latex("\x1b[2J") == r"\textbackslash{}x1b{[}2J"


def test_hostile_names_stay_text_in_every_file(tmp_path: Path) -> None:
    answers = {"full": [(100.0, "x")] * 3, "quest": [(50.0, "x")] * 3}
    name = f"{HOSTILE} {MARKDOWN} {SCRIPT}"[:290]
    sweep = sweep_of(tmp_path, answers, model=name, method_label=name)
    assert main([str(sweep.folder)]) == 0
    for file in ("results", "setup", "captions"):
        text = (sweep.folder / "paper" / f"{file}.tex").read_text()
        text = re.sub(r"^% .*$", "", text, flags=re.M)  # our names of figures
        for own in (latex.AT_MOST_AS_WIDE, r"\begin{tabular}", "\\end{tabular}%\n}\n"):
            text = text.replace(own, "")
        assert "\\input" not in text
        assert not re.search(r"(?<!\\)[#%]", text)
        for command in re.findall(r"\\([a-zA-Z]+)", text):
            assert command in {
                *("begin", "end", "centering", "footnotesize", "caption", "label", "toprule"),
                *("midrule", "bottomrule", "scriptsize", "textbf", "Delta", "times", "leq"),
                *("textbackslash", "textasciitilde", "textasciicircum", "textless", "dag"),
                *("textgreater", "textbar", "textquotedbl", "textasciigrave", "ddag", "dots"),
                *("pm", "geq"),
            }, command


def test_a_cell_that_is_best_is_bold_with_its_interval() -> None:
    shown = Table(["Method", "Score"], [["a_1", "1.0 [0.5, 2.0]"], ["b", "–"]], {(0, 1)})
    lines = latex.table(shown, "What.", "tab:x").splitlines()
    assert r"a\_1 & \textbf{1.0 {\scriptsize {[}0.5, 2.0{]}}} \\" in lines
    assert r"b & -- \\" in lines
    assert lines[0] == r"\begin{table}[t]"


def test_the_set_up_is_one_sentence_for_each_model_and_task() -> None:
    known = {"protocol": "unified", "prompts": "topkbench 1", "k": 64, "transformers": "5.23.0"}
    rows = [
        make_row(method="full", subtask="vt", prompts="topkbench 1", torch="2.13.0", score=1.0),
        make_row(method="quest", subtask="vt", torch="2.13.0", score=1.0, **known),
        make_row(method="quest", subtask="mean", torch="2.13.0", score=1.0, **known),
    ]
    (sentence,) = sentences(frame([row.replace(transformers="5.23.0") for row in rows]), "0.1.0")
    assert sentence == (
        "We ran Full attention and Quest on tiny with the task ruler (prompts: topkbench 1),"
        " at 4,096 tokens, n = 25 samples per sub-task, the question decoded with the method,"
        " the unified protocol, k = 64, seed 0, on AMD EPYC 9554, 2 cores, using topkbench 0.1.0"
        " (commit fb6212e9d0c1), torch 2.13.0, transformers 5.23.0."
    )


# Sources -----------------------------------------------------------------------------------------


def papers() -> Mapping[str, str]:
    """Return the first arXiv number of each method's source, as its docstring says it."""
    found = {}
    for name in METHODS:
        text = (ROOT / "methods" / f"{name}.py").read_text()
        section = re.search(r"^    Source:\n(.*?)\n\n", text, re.M | re.S)
        number = re.search(r"arXiv:(\d{4}\.\d{4,5})", section[1]) if section else None
        if number:
            found[name] = number[1]
    return found


def test_every_method_from_a_paper_has_its_entry() -> None:
    numbers = {
        name: re.findall(r"eprint = \{(\S+)\}", text) for name, text in sources.entries().items()
    }
    assert len(papers()) == 15
    assert {name: numbers.get(name) for name in papers()} == {
        name: [number] for name, number in papers().items()
    }
    benchmarks = {name for name, _, _ in sources.BENCHMARKS}
    assert set(numbers) == {*papers(), *benchmarks}


def test_entries_are_whole_bibtex() -> None:
    for name, text in sources.entries().items():
        assert text.startswith(f"@misc{{{name},\n")
        assert text.count("{") == text.count("}")
        fields = re.findall(r"^  (\w+) = \{.*\},?$", text, re.M)
        assert fields[:5] == ["title", "author", "year", "eprint", "archiveprefix"]
        (authors,) = re.findall(r"author = \{(.*)\},$", text, re.M)
        assert all(one.count(", ") == 1 for one in authors.split(" and "))
        (number,) = re.findall(r"eprint = \{(\d\d)", text)
        assert f"year = {{20{number}}}" in text


def test_the_sources_are_those_of_what_appears(exported: Path) -> None:
    text = (exported / "sources.bib").read_text()
    assert re.findall(r"^@misc\{(\w+),", text, re.M) == ["hata", "quest", "ruler"]


@pytest.mark.parametrize(
    ("task", "subtask", "name"),
    [
        ("lm_eval", "longbench_qasper_e", "longbench"),
        ("lm_eval", "longbench2_govt_multi", "longbench2"),
        ("lm_eval", "infinitebench_passkey", "infinitebench"),
        ("lm_eval", "babilong_qa1", "babilong"),
        ("lm_eval", "gsm8k", "gsm8k"),
        ("lm_eval", "hendrycks_math500", "math"),
        ("lm_eval", "math500", "math"),
        ("ruler_words", "vt", "ruler"),
    ],
)
def test_benchmarks_are_cited(task: str, subtask: str, name: str) -> None:
    rows = pd.DataFrame({"method": ["full"], "task": [task], "subtask": [subtask]})
    assert list(sources.cited(rows)) == [name]


def test_what_is_no_result_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path} must hold cells.json")
