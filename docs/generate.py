"""Pages that are generated when the site is built: parts with their options, and the commands."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
TITLES = {
    "encoder": "Encoders", "adapter": "Adapters", "backbone": "Backbones",
    "sampler": "Samplers", "objective": "Objectives",
}  # fmt: skip
PAGES = (  # in the order of the navigation; one that is not written yet is left out
    ("Quick start", "index.md"),
    ("Concepts", "concepts.md"),
    ("The page", "page.md"),
    ("Samplers compared", "samplers.md"),
    ("Objectives compared", "objectives.md"),
    ("Data", "data.md"),
    ("Recipes", "recipes.md"),
    ("Evaluation", "evaluation.md"),
    ("Fidelity", "fidelity.md"),
    ("Ablations", "ablation.md"),
    ("Serving", "serving.md"),
    ("Scale", "scale.md"),
    ("Plugins", "plugins.md"),
    ("Troubleshooting", "troubleshooting.md"),
)


def on_config(config: Any) -> Any:
    """Lay out the navigation from the pages that exist."""
    folder = Path(config["docs_dir"])
    known = [{title: page} for title, page in PAGES if (folder / page).is_file()]
    listed = {page for _, page in PAGES}
    others = [path.name for path in sorted(folder.glob("*.md")) if path.name not in listed]
    parts = [{title: f"parts/{kind}s.md"} for kind, title in TITLES.items()]
    reference = [f"reference/{path.name}" for path in sorted((folder / "reference").glob("*.md"))]
    notebook = {"Quick start (notebook)": "notebooks/quickstart.md"}
    config["nav"] = [
        known[0], notebook, *known[1:3], {"Parts": parts}, *known[3:], *others,
        {"Commands": "commands.md"}, {"Python API": reference},
    ]  # fmt: skip
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add the generated pages."""
    for path, text in generated():
        files.append(File.generated(config, path, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Put measured tables, and options of recipes, where a page asks for them."""
    markdown = re.sub(r"<!-- table: ([\w-]+) -->", lambda match: table(match[1]), markdown)
    if "<!-- recipe options -->" in markdown:
        markdown = markdown.replace("<!-- recipe options -->", "\n".join(sections()))
    return markdown.replace("<!-- scale: assumptions -->", assumptions())


def generated() -> Iterator[tuple[str, str]]:
    """Paths and texts of the generated pages."""
    for kind in TITLES:
        yield f"parts/{kind}s.md", "\n".join(kind_page(kind)) + "\n"
    yield "commands.md", "\n".join(commands_page()) + "\n"
    for path in sorted((ROOT / "docs" / "notebooks").glob("*.ipynb")):
        yield f"notebooks/{path.stem}.md", notebook_page(path)


def notebook_page(path: Path) -> str:
    """Run a notebook and return it as Markdown; an error in a cell stops the build."""
    import nbformat
    from nbconvert import MarkdownExporter
    from nbconvert.preprocessors import ExecutePreprocessor

    notebook = nbformat.read(path, as_version=4)
    run = ExecutePreprocessor(timeout=120, kernel_name="python3")
    run.preprocess(notebook, {"metadata": {"path": str(path.parent)}})
    text, _ = MarkdownExporter().from_notebook_node(notebook)
    return str(text)


def kind_page(kind: str) -> Iterator[str]:
    """Every installed part of a kind with its options, as its constructor declares them."""
    from diffa.spec import registry

    yield f"# {TITLES[kind]}\n"
    written = "{name: NAME, OPTION: VALUE}"
    where = f"adapters: {{KEY: {written}}}" if kind == "adapter" else f"{kind}: {written}"
    yield f"Generated from the constructors. In a spec: `{where}`.\n"
    for part in registry.list_parts(kind):
        if part.is_builtin:
            yield from part_section(kind, part)


def part_section(kind: str, part: Any) -> Iterator[str]:
    """One part: what it does, its options, types, defaults and meanings."""
    from diffa.spec import registry
    from diffa.spec.docstrings import option_descriptions
    from diffa.spec.schema import describe_type, read_schema

    cls = registry.load_part(kind, part.name)
    yield f"## {part.name}\n"
    yield prose(cls) + "\n"
    if part.extras:
        yield f"Needs `pip install '{part.dist}[{','.join(part.extras)}]'`.\n"
    meanings, options = option_descriptions(cls), read_schema(cls).options
    if not options:
        yield "It has no options.\n"
        return
    yield "| option | type | default | meaning |\n|---|---|---|---|"
    for name, option in options.items():
        cells = [
            f"`{name}`",
            cell(describe_type(option.hint)),
            f"`{json.dumps(plain(option.default))}`",
        ]
        yield f"| {' | '.join(cells)} | {cell(meanings.get(name, ''))} |"
    yield ""


def prose(cls: type) -> str:
    """A class's docstring without its sections, literals as Markdown's."""
    text = inspect.cleandoc(cls.__doc__ or "")
    text = re.split(r"\n(?=\w+:\n)", text)[0]
    return text.replace("``", "`").replace("<", "&lt;").strip()


def cell(text: str) -> str:
    """A text inside a table."""
    return text.replace("|", "\\|").replace("``", "`").replace("<", "&lt;")


def plain(value: Any) -> Any:
    """Return a default as plain JSON values."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return plain(dataclasses.asdict(value))
    if isinstance(value, Mapping):
        return {key: plain(inner) for key, inner in value.items()}
    return [plain(inner) for inner in value] if isinstance(value, tuple | list) else value


def sections() -> Iterator[str]:
    """The sections of a recipe with their options, as their classes declare them."""
    import typing

    from diffa.spec.docstrings import option_descriptions
    from diffa.spec.schema import describe_type
    from diffa.trainers import config_sections

    titles = {
        "RecipeConfig": "Recipe", "StageConfig": "Stage", "DataConfig": "Data",
        "OptimizerConfig": "Optimizer", "ScheduleConfig": "Schedule",
        "EvaluationConfig": "Evaluation", "CacheConfig": "Feature cache",
    }  # fmt: skip
    for name, title in titles.items():
        cls = getattr(config_sections, name)
        hints, meanings = typing.get_type_hints(cls), option_descriptions(cls)
        yield f"### {title}\n\n{prose(cls)}\n"
        yield "| option | type | default | meaning |\n|---|---|---|---|"
        for field in dataclasses.fields(cls):
            default = field.default
            if field.default_factory is not dataclasses.MISSING:
                default = field.default_factory()
            if isinstance(default, config_sections.LearnerConfig):
                default = default.name
            elif dataclasses.is_dataclass(default):
                default = {}  # a section of its own, all at its defaults
            kind = describe_type(hints[field.name]).replace("Config", " section")
            cells = [f"`{field.name}`", cell(kind), f"`{json.dumps(plain(default))}`"]
            yield f"| {' | '.join(cells)} | {cell(meanings.get(field.name, ''))} |"
        yield ""


def assumptions() -> str:
    """The numbers that docs/scale.md's times rest on."""
    path = ROOT / "benchmarks" / "results" / "scale.json"
    if not path.is_file():
        return ""
    figures = json.loads(path.read_text())
    reached = figures["tflops"] * figures["mfu"]
    return (
        f"Assumed: {figures['gpu']}, {figures['tflops']:g} TFLOP/s in dense bfloat16, of which "
        f"{figures['mfu']:.0%} is reached ({reached:.0f} TFLOP/s)."
    )


def commands_page() -> Iterator[str]:
    """What `diffa --help` says of every command."""
    import typer

    from diffa.cli import app

    yield "# Commands\n"
    yield "Generated from the command line's own help; `diffa COMMAND --help` says it too.\n"
    yield from command_sections(typer.main.get_command(app), "diffa")


def command_sections(command: Any, name: str) -> Iterator[str]:
    """A command, or a group of them, with arguments and options."""
    inner = getattr(command, "commands", {})
    if name != "diffa":
        yield f"## {name}\n"
        yield f"{cell((command.help or '').split(chr(10))[0])}\n"
        yield from parameter_table(command)
    for key, part in inner.items():
        if not part.hidden:
            yield from command_sections(part, f"{name} {key}")


def parameter_table(command: Any) -> Iterator[str]:
    """The arguments and options of a command."""
    visible = [p for p in command.params if not getattr(p, "hidden", False) and p.name != "help"]
    if not visible:
        return
    yield "| argument or option | default | meaning |\n|---|---|---|"
    for parameter in visible:
        names = ", ".join(f"`{o}`" for o in [*parameter.opts, *parameter.secondary_opts])
        if parameter.param_type_name == "argument":
            names = f"`{(parameter.metavar or parameter.name).upper()}`"
        default = parameter.default
        text = "" if default is None or callable(default) or default == "" else f"`{default}`"
        text = "" if "Sentinel" in text else text
        yield f"| {names} | {text} | {cell(getattr(parameter, 'help', '') or '')} |"
    yield ""


def table(name: str) -> str:
    """A table of benchmarks/results/NAME.json: a list of rows, or `{"rows": [...]}`."""
    path = ROOT / "benchmarks" / "results" / f"{name}.json"
    if not path.is_file():
        return f"*Not measured yet: `benchmarks/results/{name}.json` is missing.*"
    data = json.loads(path.read_text())
    rows = data["rows"] if isinstance(data, dict) else data
    heads = [head for head, value in rows[0].items() if not isinstance(value, dict)]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    lines += ["| " + " | ".join(str(row[head]) for head in heads) + " |" for row in rows]
    return "\n".join(lines)
