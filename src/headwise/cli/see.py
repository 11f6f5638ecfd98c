"""`headwise see`: load a model, measure its heads on texts, write the atlas and the report."""

import argparse
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headwise.cli.errors import Interrupted, UserError, one_line
from headwise.cli.sources import closest, model_source, output_folder, read_texts

if TYPE_CHECKING:
    from headwise.cli.loading import Loaded

ATLAS = "atlas.safetensors"
REPORT = "report.html"
# Of each text, unless --tokens says otherwise: enough for sinks, induction and distance to show,
# and seconds on a small model.
DEFAULT_TOKENS = 2048
DEFAULT_TEXTS = 4
# More than any tokenizer packs into a token on average, so that no text comes out short.
_CHARACTERS_PER_TOKEN = 8


def run(options: argparse.Namespace) -> int:
    """Measure, write both files, print what was found and where it is."""
    source = model_source(options.model, options.gguf_file)
    texts = read_texts(options.text) if options.text else None
    out = output_folder(options.out, source)
    check_output(out, options.resume, options.force)
    if options.instruments:
        check_instruments(options.instruments)
    _quiet_libraries(options.quiet)

    from headwise.cli.loading import load
    from headwise.cli.progress import Progress

    progress = Progress(quiet=options.quiet)
    try:
        with progress:
            progress.note(f"loading {source.name}")
            _set_threads(options.threads)
            loaded = load(
                source, options.dtype, options.device, options.trust_remote_code, options.revision
            )
            tokens = token_limit(options.tokens, loaded, source.name)
            if loaded.unset:
                progress.note(f"{len(loaded.unset)} weights outside the layers are not in the "
                              f"files (such as {loaded.unset[0]}); they do not reach the heads")
            if loaded.trained and tokens > loaded.trained:
                progress.note(f"{tokens} tokens are more than the {loaded.trained} that "
                              f"{source.name} is made for")
            named = texts or default_texts(tokens)
            atlas = measure(options, source.name, loaded, named, tokens, out, progress)
    except KeyboardInterrupt:
        raise Interrupted(_how_to_go_on(options, out)) from None
    return finish(atlas, out, options)
