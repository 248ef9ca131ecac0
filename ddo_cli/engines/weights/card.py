"""The card of a model on the Hub, made from the provenance of its weights and the figures of its run."""

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import yaml

from ddo_cli import checkpoint, hub
from ddo_cli.engines import pages
from ddo_cli.files import sha256
from ddo_cli.models import registry
from ddo_cli.places import EMBEDDED, embedded_names
from ddo_cli.report import html, markdown

Links = Sequence[dict[str, Any]]
USE = {  # how weights of a kind are given to a command
    "model": "sample --ckpt", "discriminator": "guide-sample --disc", "classifier": "sample --classifier",
}  # fmt: skip
# Licences of published files by their names, as their authors' repositories state them. Files whose authors state
# none, such as DG's, are not here.
PUBLISHED = {
    r"baseline-cifar10-32x32-uncond-v[pe]\.pkl": "apache-2.0",
    r"baseline-imagenet-64x64-cond-adm\.pkl": "mit",
    r"edm-(cifar10|ffhq|afhqv2|imagenet)-.+\.pkl": "cc-by-nc-sa-4.0",
    r"edm2-img(64|512)-.+\.pkl": "cc-by-nc-sa-4.0",
    r"var_d\d+-ddo\.pth": "cc-by-nc-sa-4.0",
    r"var_d\d+\.pth": "mit",
    r"DiT-XL-2-\d+x\d+\.pt": "cc-by-nc-4.0",
    r"SiT-XL-2-256(x256)?\.pt": "mit",
    r"\d+x\d+_(diffusion(_uncond)?|classifier)\.pt": "mit",
}
OUR_LICENCE = "apache-2.0"  # of the embedded weights
DIGITS = "Optical Recognition of Handwritten Digits (E. Alpaydin, C. Kaynak), CC BY 4.0"


class Licence(NamedTuple):
    """As the Hub names it, None: not known; and where it is known from, or what is missing, in a sentence."""

    name: str | None
    told: str


def licence_of(header: dict[str, Any], given: str | None = None) -> Licence:
    """The licence of the base that weights were made from, which goes on to them. given: by who publishes them."""
    links: Links = header.get("provenance", [])
    if given is not None:
        return Licence(given, "as stated by who published these weights")
    first = links[0] if links else {}
    source = str(first.get("source", ""))
    if stated := first.get("licence"):
        return Licence(str(stated), f"that of the base, {source}, as its model card states")
    if name := next((name for like, name in PUBLISHED.items() if re.fullmatch(like, source)), None):
        return Licence(name, f"that of the published file {source}, which is known by its name")
    embedded = {sha256(checkpoint.resolve(EMBEDDED + name)): EMBEDDED + name for name in embedded_names()}
    if ours := [embedded[link["reference_sha256"]] for link in links if link.get("reference_sha256") in embedded]:
        return Licence(OUR_LICENCE, f"that of the base, {ours[0]}, which comes with ddo")
    if (base := base_model(links)) is not None and (name := hub.licence(f"hf://{base}")):
        return Licence(name, f"that of the base, {base}, as its model card states")
    made_of = f"the weights were made from {source}; find its terms before use" if source else "none was stated"
    return Licence(None, f"not known: {made_of}")


def base_model(links: Links) -> str | None:
    """The repository of the Hub whose weights were finetuned last, if they were from there."""
    names = [str(link.get("recipe", {}).get("model", {}).get("ckpt", "")) for link in links]
    return next((match[1] for name in reversed(names) if (match := hub.ADDRESS.fullmatch(name))), None)


def address(repo: str, revision: str | None) -> str:
    """What --ckpt takes."""
    return f"hf://{repo}{f'@{revision}' if revision else ''}"


class Subject(NamedTuple):
    """What is published. page: the report of its run, None: of a weight file alone. pictures: captions by file name."""

    header: dict[str, Any]
    num_parameters: int
    page: html.Page | None
    pictures: dict[str, str]


def write(repo: str, revision: str | None, licence: Licence, subject: Subject) -> str:
    """The card: a head that the Hub reads, then Markdown."""
    header, page = subject.header, subject.page
    links: Links = header.get("provenance", [])
    sections = {} if page is None else {section.title: section.blocks for section in page.sections}
    notes = [] if page is None else [block for block in page.blocks if isinstance(block, html.Text)]
    pictures = [
        f"![{markdown.text(told)}]({name})\n\n*{markdown.text(told)}*" for name, told in subject.pictures.items()
    ]
    has_recipe = any(link.get("recipe") for link in links)
    parts = [
        f"---\n{yaml.safe_dump(_head(header, licence), sort_keys=False)}---",
        f"# {markdown.text(repo.rpartition('/')[2])}",
        markdown.text(page.headline if page else "A weight file without the figures of the run that it comes from."),
        *pictures,
        "## Use",
        f"```sh\npip install 'ddo-cli[hub]'\nddo {USE[header['kind']]} {address(repo, revision)}\n```",
        markdown.blocks(map(html.Text, _described(header, subject.num_parameters))),
        _under("Figures", [*notes, *sections.get("Scores", ()), *sections.get("Result", ())]),
        _under("How it was made", [pages.steps_table(links)] if links else [html.Text("The file does not tell.")]),
        markdown.blocks(sections.get("Recipe", ())),
        "The whole recipe is in `recipe.yaml`." if has_recipe else "",
        _under("Licence", map(html.Text, _licences(links, licence))),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _under(heading: str, shown: Iterable[html.Block]) -> str:
    """A section; empty if nothing is shown."""
    content = markdown.blocks(shown)
    return f"## {heading}\n\n{content}" if content else ""


def _head(header: dict[str, Any], licence: Licence) -> dict[str, Any]:
    base, is_model = base_model(header.get("provenance", [])), header["kind"] == "model"
    is_of_text = "text_encoder" in header["config"].get("options", {})
    task = "text-to-image" if is_of_text else "unconditional-image-generation"
    return {
        "library_name": "ddo",
        **({} if licence.name is None else {"license": licence.name}),
        **({} if base is None else {"base_model": base}),
        **({"pipeline_tag": task} if is_model else {}),
        "tags": ["ddo", header["kind"]],
    }


def _described(header: dict[str, Any], num_parameters: int) -> Iterator[str]:
    """What the weights are, and what else is needed to use them."""
    config = header["config"]
    shape = "x".join(map(str, config.get("shape", [])))
    classes = f", {config['num_classes']} classes" if config.get("num_classes") else ""
    yield f"A {header['kind']} of ddo: network {config['name']}, {num_parameters:,} parameters, {shape}{classes}."
    if sampling := {key: value for key, value in header.get("sampling", {}).items() if key != "batch"}:
        yield "Samples are drawn with " + ", ".join(f"{key} {value}" for key, value in sampling.items()) + "."
    if (base := header.get("base")) is not None:
        yield f"It is an adapter: {base['path']} (SHA-256 {base['sha256'][:12]}) is needed beside it."
    if header["kind"] == "discriminator":
        guided = header.get("trained_on", {})
        yield f"It guides {guided.get('model')} (SHA-256 {str(guided.get('model_sha256'))[:12]})."
    if header["kind"] == "model" and (name := config["name"]) not in registry.BUILTIN:
        yield f"The network {name} is none of ddo's: the Python file that registers it is needed, as --model-file."


def _licences(links: Links, licence: Licence) -> Iterator[str]:
    yield f"Weights: {f'{licence.name}, ' if licence.name else ''}{licence.told}."
    for data in dict.fromkeys(filter(None, map(pages.data_of, links))):
        is_ours = data.startswith(f"{EMBEDDED}digits")
        yield f"Training images, {data}: {DIGITS if is_ours else 'their terms are not known to the program'}."
