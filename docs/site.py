"""What MkDocs cannot do alone: ``mkdocs.yml`` names this file as its hook.

- Links from a page to a file of the repository lead to a copy in the site.
- Pictures in SVG are put into the page, so that they follow its colours, light or dark.
- Notebooks become pages, with the outputs that they hold.
- A page of the Python interface for every module that exports public names, so that none can be forgotten.
"""

from __future__ import annotations

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

_MODULES = {
    "convert": "Outsourcing a model",
    "linear": "The outsourced layer",
    "trainer": "Training",
    "bundle": "Splitting a model",
    "session": "Sessions and traffic",
    "backend": "Backends",
    "transport": "Transports",
    "protocol": "Messages",
    "plugins": "Hook plugins",
    "tracking": "Following a run",
    "errors": "Errors",
}


def _interface() -> dict[str, tuple[str, tuple[str, str], list[str]]]:
    """Page → its title, the package that exports the names and the module that has them, and the names."""
    import ciphertune
    from ciphertune import testing

    pages = {}
    for module in sorted(ciphertune._PUBLIC, key=lambda m: (*_MODULES, m).index(m)):
        title = _MODULES.get(module, f"ciphertune.{module}")
        pages[f"api/{module}.md"] = (title, ("ciphertune", module), list(ciphertune._PUBLIC[module]))
    pages["api/testing.md"] = ("Testing plugins", ("ciphertune.testing", ""), list(testing.__all__))
    return pages


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put the pages of the Python interface at the end of the navigation."""
    assert config.nav is not None
    config.nav[-1]["Reference"].append({"Python": [{title: page} for page, (title, _, _) in _interface().items()]})
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what is not in ``docs`` as it is read: the Python interface, notebooks, files that pages link to."""
    import ciphertune.testing

    for page, (title, (package, module), names) in _interface().items():
        homes = ciphertune.testing._HOMES if package == "ciphertune.testing" else dict.fromkeys(names, module)
        lines = [f"# {title}\n\n`from {package} import …`\n"]
        lines += [f"::: {package}.{homes[name]}.{name}\n" for name in names]
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
