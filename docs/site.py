"""What MkDocs cannot do alone: ``mkdocs.yml`` names this file as its hook.

- Links from a page to a file of the repository lead to a copy in the site.
- Pictures in SVG are put into the page, so that they follow its colours, light or dark.
- Notebooks become pages, with the outputs that they hold.
- A page of the Python interface for every module that exports public names, so that none can be forgotten.
"""

from __future__ import annotations

import importlib
import inspect
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
_COPIES = "files"

# Module of the core → title of its page. Front modules have pages of their own; other modules export public names.
MODULES = {
    "outsourcing.convert": "Outsourcing a model",
    "outsourcing.clear": "Computing in the clear",
    "outsourcing.calibration": "Calibrating a model",
    "linear": "The outsourced layer",
    "training.trainer": "Training",
    "training.concrete_ml": "Moving from Concrete ML",
    "interleaving.interleaver": "Interleaving",
    "bundle.writer": "Splitting a model",
    "bundle.client": "Loading a client's part",
    "client.session": "Sessions",
    "traffic": "Traffic",
    "backend": "Backends",
    "transport": "Transports",
    "protocol": "Messages",
    "weights": "Weights",
    "status": "Status of a worker",
    "selection": "Selection strings",
    "callers": "Callers of a session",
    "cache": "Cache",
    "key_files": "Key files",
    "plugins.manager": "Hook plugins",
    "plugins.registry": "Looking plugins up",
    "hookspecs": "What hooks see",
    "tracker": "Trackers",
    "errors": "Errors",
}
FRONT = sorted(path.stem for path in (ROOT / "core" / "ciphertune").glob("*.py") if not path.stem.startswith("__"))


def interface() -> dict[str, tuple[str, list[str]]]:
    """Page → its title, and the dotted paths of the names on it."""
    import ciphertune
    from ciphertune import testing

    modules = {*ciphertune._PUBLIC, *FRONT, "plugins.manager"}
    if unknown := modules ^ set(MODULES):
        raise ValueError(f"docs/site.py: MODULES lacks modules, or has some that export nothing: {sorted(unknown)}")
    pages = {}
    for module, title in MODULES.items():
        names = list(ciphertune._PUBLIC.get(module, ()))
        if module in FRONT or not names:
            names = public_names(f"ciphertune.{module}")
        pages[f"api/{module}.md"] = (title, [f"ciphertune.{module}.{name}" for name in names])
    homes = [f"ciphertune.testing.{testing._HOMES[name]}.{name}" for name in testing.__all__]
    pages["api/testing.md"] = ("Testing plugins", homes)
    return pages


def public_names(path: str) -> list[str]:
    """Classes and functions that a module defines and does not mark as its own, in their order; no hooks."""
    module = importlib.import_module(path)
    return [
        name
        for name, value in vars(module).items()
        if not name.startswith(("_", "ciphertune_"))
        and (inspect.isclass(value) or inspect.isfunction(value))
        and value.__module__ == path
    ]


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put the pages of the Python interface at the end of the navigation."""
    assert config.nav is not None
    config.nav[-1]["Reference"].append({"Python": [{title: page} for page, (title, _) in interface().items()]})
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what is not in ``docs`` as it is read: the Python interface, notebooks, files that pages link to."""
    for page, (title, paths) in interface().items():
        module = page.removeprefix("api/").removesuffix(".md")
        behind = "." in module and module != "plugins.manager"  # a room, whose public names the package exports
        exported = "ciphertune" if behind else f"ciphertune.{module}"
        lines = [f"# {title}\n\n`from {exported} import …`\n", *(f"::: {path}\n" for path in paths)]
        files.append(File.generated(config, page, content="\n".join(lines)))
    for file in list(files):
        if file.src_uri.endswith(".ipynb"):
            files.remove(file)
            for name, content in _notebook(DOCS / file.src_uri).items():
                files.append(
                    File.generated(config, posixpath.join(posixpath.dirname(file.src_uri), name), content=content)
                )
    for page in DOCS.rglob("*.md"):
        for target in _outside(page, page.read_text(encoding="utf-8")).values():
            name = f"{_COPIES}/{target.relative_to(ROOT).as_posix()}"
            if files.get_file_from_path(name) is None:
                files.append(File.generated(config, name, abs_src_path=str(target)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links to copies, pictures into the page, and the fence that marks what must fail into one that Markdown knows."""
    source = DOCS / page.file.src_uri
    here = posixpath.dirname(page.file.src_uri)
    for link, target in _outside(source, markdown).items():
        copy = posixpath.relpath(f"{_COPIES}/{target.relative_to(ROOT).as_posix()}", here or ".")
        markdown = markdown.replace(f"]({link})", f"]({copy})")
    markdown = re.sub(r"\]\(([\w./-]+)\.ipynb\)", r"](\1.md)", markdown)
    markdown = re.sub(r"^```sh fails$", '```sh title="This must fail"', markdown, flags=re.M)
    return re.sub(
        r"^!\[([^\]]*)\]\(([\w./-]+\.svg)\)$", lambda m: _figure(source.parent / m[2], m[1]), markdown, flags=re.M
    )


def _outside(page: Path, markdown: str) -> dict[str, Path]:
    """Relative links of a page to files of the repository that are not in ``docs``."""
    links = {}
    for link in re.findall(r"\]\((\.\./[^)#\s]+)\)", markdown):
        target = (page.parent / link).resolve()
        if target.is_file() and not target.is_relative_to(DOCS):
            links[link] = target
    return links


def _figure(path: Path, alt: str) -> str:
    """A picture as HTML. A blank line in it would end it, for Markdown."""
    svg = re.sub(r"<\?xml.*?\?>|<!DOCTYPE.*?>|<!--.*?-->", "", path.read_text(encoding="utf-8"), flags=re.S)
    # Several pictures on a page must not share ids.
    svg = re.sub(r'((?:\bid="|href="#|url\(#))', rf"\1{path.stem}-", svg)
    svg = svg.replace("<svg ", f'<svg role="img" aria-label="{alt}" ', 1)
    return '<figure class="picture">' + re.sub(r"\n\s*", "\n", svg).strip().replace("\n", " ") + "</figure>"


def _notebook(path: Path) -> dict[str, Any]:
    """A notebook as a page, and its pictures: names beside it → contents."""
    from nbconvert import MarkdownExporter

    text, resources = MarkdownExporter().from_filename(str(path), {"output_files_dir": f"{path.stem}_files"})
    return {f"{path.stem}.md": text, **resources["outputs"]}
