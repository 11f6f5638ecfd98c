"""Other packages' talk does not reach the terminal."""

import logging

import pytest

from headwise.cli.dispatch import run


def test_torchao_is_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    logging.getLogger("torchao").setLevel(logging.NOTSET)
    assert run(["papers", "list"]) == 0
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).warning("kernels that are not there")
    assert "kernels" not in capsys.readouterr().err
