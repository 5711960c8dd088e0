"""`surgery generate`: text of an exported model, beside that of the same weights without its cuts."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from surgery.commands.shared import Debug, Device, Folder, Json, Trust, device_of, messages, say, working, write_json


def generate(
    folder: Folder,
    prompt: Annotated[str | None, typer.Option(help="Text to go on with; needs a tokenizer in the folder.")] = None,
    tokens: Annotated[str | None, typer.Option(help="Numbers of tokens in place of a text: '5 17 3'.")] = None,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate, at most.")] = 40,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token; above it tokens are drawn.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of drawn tokens.")] = 0,
    compare: Annotated[bool, typer.Option(help="Also generate without the cuts of surgery.json.")] = True,
    device: Device = None,
    trust_remote_code: Trust = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Go on with a prompt, with the cuts and without them."""
    if (prompt is None) == (tokens is None):
        raise typer.BadParameter("Give one of the two.", param_hint="--prompt / --tokens")
    if prompt == "":
        raise typer.BadParameter("There is nothing to go on from.", param_hint="--prompt")
    numbers = [] if tokens is None else tokens.replace(",", " ").split()
    if tokens is not None and not (numbers and all(number.isdecimal() for number in numbers)):
        raise typer.BadParameter(f"{tokens!r} is no list of numbers from 0.", param_hint="--tokens")
    with messages(debug):
        import torch

        from surgery.export import document
        from surgery.export.load import load_checkpoint
        from surgery.patch import patched
        from surgery.pretrained import tokenizer_of

        _, spec = document.read(folder)
        model = load_checkpoint(folder, trust_remote_code=trust_remote_code).to(device_of(device)).eval()
        tokenizer, missing = tokenizer_of(str(folder), trust_remote_code=trust_remote_code)
        _require(model, tokenizer, prompt is not None, missing, numbers)
        given = (
            tokenizer(prompt, return_tensors="pt")["input_ids"]
            if prompt is not None
            else torch.tensor([list(map(int, numbers))])
        )
        given = given.to(model.device)
        drawn: dict[str, Any] = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}

        def run() -> list[int]:
            torch.manual_seed(seed)
            made = model.generate(given, attention_mask=torch.ones_like(given), max_new_tokens=new_tokens, **drawn)
            return made[0, 0 if model.config.is_encoder_decoder else given.shape[1] :].tolist()

        with working("Generating"):
            found = {"with the cuts": run()}
            if compare and len(spec):
                with patched(model, strict=False):
                    found["without them"] = run()
        shown = {
            name: " ".join(map(str, made)) if tokenizer is None else tokenizer.decode(made, skip_special_tokens=True)
            for name, made in found.items()
        }
        if as_json:
            write_json({"prompt": given[0].tolist(), **{n: {"tokens": found[n], "text": shown[n]} for n in found}})
            return
        for name, text in shown.items():
            say(f"{name}: {text}")


def _require(model: Any, tokenizer: Any, is_text: bool, missing: str, numbers: list[str]) -> None:
    """Raises SurgeryError for a model that does not generate, a text without a tokenizer, tokens beyond the vocabulary."""
    from surgery.errors import SurgeryError, describe

    what = f"a {type(model).__name__}"
    if not getattr(model, "can_generate", lambda: False)():
        raise SurgeryError(describe("generate", what, "a model that generates", "Run it from Python."))
    if is_text and tokenizer is None:
        do = "Pass --tokens, or export with a tokenizer."
        raise SurgeryError(describe("--prompt", f"no tokenizer ({missing})", "one in the folder", do))
    size = model.get_input_embeddings().num_embeddings
    if numbers and max(map(int, numbers)) >= size:
        found = f"token {max(map(int, numbers))}"
        raise SurgeryError(describe("--tokens", found, f"numbers below {size}, the size of the vocabulary", "Change it."))
