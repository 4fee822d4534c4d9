"""What the site of the documentation adds to the pages of docs/.

README, CHANGELOG and CONTRIBUTING become pages. The reference has every public name, in the groups of
`gum_optax/__init__.py`. A link to another file of the repository becomes its text: on the site it would lead
nowhere.
"""

import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parent
PAGES = {"README.md": "readme.md", "CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}
# The page of each group of public names.
GROUPS = {
    "Optimizers, and what all of them share.": "optimizers",
    "A rule in a subspace.": "subspaces",
    "Rules over full matrices, and what is done to a whole step.": "rules",
    "A training step layer by layer.": "steps",
    "Training without a backward pass.": "steps",
    "A model's leaves seen as matrices.": "matrices",
    "Shardings.": "matrices",
    "Functions of a state.": "states",
    "Functions of arrays.": "arrays",
    "Draws, and what travels inside an update.": "arrays",
}
_LINK = re.compile(r"(!?)\[((?:[^\]\[]|\[[^\]]*\])*)\]\(([^)\s#]*)(#[^)\s]*)?\)")


def reference() -> dict[str, str]:
    """The pages of the reference, by name; a group of names that has no page is a KeyError.

    An optimizer has a page of its own with its docstring, and the reference begins with links to these.
    """
    pages: dict[str, str] = {}
    links: dict[str, str] = {}
    for line in (ROOT / "gum_optax" / "__init__.py").read_text("utf-8").splitlines():
        if found := re.fullmatch(r"# (.*)", line):
            title = found[1]
        elif found := re.fullmatch(r"from \.\S+ import (\w+) as \1", line):
            name, page = found[1], f"api/{GROUPS[title]}.md"
            heading = f"# {title.removesuffix('.')}\n\n"
            if heading not in pages.setdefault(page, ""):
                pages[page] += heading
            if (ROOT / "docs" / "optimizers" / f"{name}.md").is_file():
                links[heading] = links.get(heading, "") + f"- [`{name}`](../optimizers/{name}.md)\n"
            else:
                pages[page] += f"::: gum_optax.{name}\n\n"
    for heading, listed in links.items():
        pages = {page: text.replace(heading, f"{heading}{listed}\n") for page, text in pages.items()}
    return pages


def on_files(files, config):
    """Add the pages that no file of docs/ has."""
    root = {name: (ROOT / source).read_text("utf-8") for source, name in PAGES.items()}
    for name, content in (root | reference()).items():
        files.append(File.generated(config, name, content=content))
    return files


def on_page_markdown(markdown, page, config, files):
    """Point links to where their targets stand on the site."""
    docs = Path(config.docs_dir).resolve()
    name = page.file.src_uri
    source = {to: ROOT / own for own, to in PAGES.items()}.get(name, docs / name)

    def on_site(found):
        image, text, target, anchor = found.groups()
        if not target or re.match(r"[a-z]+:", target):
            return found[0]
        path = (source.parent / target).resolve()
        if path.parent == ROOT and path.name in PAGES:
            place = PAGES[path.name]
        elif path.is_relative_to(docs) and path.is_file():
            place = path.relative_to(docs).as_posix()
        else:
            return text
        return f"{image}[{text}]({'../' * name.count('/')}{place}{anchor or ''})"

    return _LINK.sub(on_site, markdown)
