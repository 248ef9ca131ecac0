"""Files of torch.save made to harm; see test_hostile."""

import os
import zipfile

import pytest
import torch
from test_foreign import Reduced, network, official, write  # noqa: F401
from test_hostile import DAMAGED, archive, refused, shell

from ddo_cli.models import pt_files
from ddo_cli.models.discriminators import files as dg_files


def read_pt(path):
    stored = pt_files.read(path, "give another", ("output_blocks.0",)).tensors
    pt_files.check_size(stored.values(), path)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pt_file_with_a_program(official, tmp_path, zipped):  # noqa: F811
    content = {"x": Reduced(os.system, shell(official))}
    path = archive(tmp_path, content, _use_new_zipfile_serialization=zipped)
    message = refused(path, r"refused: it names 'posix\.system'", read_pt)
    assert "weights_only" not in message  # no advice to run it
    refused(write(tmp_path / "bare.pt", content), "posix|bare.pt", read_pt)


def test_pt_files_that_claim_more_than_they_hold(tmp_path):
    large = torch.zeros(1).expand(10**6, 10**6)
    refused(archive(tmp_path, {"output_blocks.0": large}), "claim", read_pt)
    refused(archive(tmp_path, {"x": torch.zeros(1).half().expand(10**6, 10**6)}), "claim", dg_files.read)
    with zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as bomb:
        bomb.writestr("archive/data.pkl", b"\x80\x02}.")
        bomb.writestr("archive/data/0", bytes(300_000_000))
    refused(tmp_path / "bomb.pt", "unpacks to 300", read_pt)


def test_pt_files_of_other_things(tmp_path):
    sparse = torch.zeros(3).to_sparse()
    for content, problem in [({"x": sparse}, "plain tensor"), ([1], "state dict"), ({1: torch.zeros(1)}, "state dict")]:
        refused(archive(tmp_path, content), problem, read_pt)
    for size in range(0, 900, 90):
        torch.save({"x": torch.zeros(100)}, tmp_path / "whole.pt")
        (tmp_path / "cut.pt").write_bytes((tmp_path / "whole.pt").read_bytes()[:size])
        refused(tmp_path / "cut.pt", "not a whole .pt|damaged zip", read_pt)


def test_a_zip_called_pkl_and_a_pickle_called_pt(official, tmp_path):  # noqa: F811
    torch.save({"ema": torch.zeros(3)}, tmp_path / "a.pkl")
    refused(tmp_path / "a.pkl", f"refused|{DAMAGED}")
    refused(write(tmp_path / "b.pt", {"ema": network(official, {})}), "refused|not a whole", read_pt)


def test_numbers_of_blocks_beyond_the_tensors(tmp_path):
    """The layouts of as many blocks as a name claims are not tried one after another."""
    names = ["time_embed.0.weight", "input_blocks.0.0.weight", "out.2.positional_embedding", "out.2.c_proj.weight"]
    content = {name: torch.ones(2, 2) for name in [*names, "input_blocks.9999999999.0.weight"]}
    refused(archive(tmp_path, content), "fit no configuration", dg_files.read)
    many = {f"p{number}.input_blocks.0.0.weight": torch.ones(1) for number in range(2000)}
    refused(archive(tmp_path, many), "several networks", dg_files.read)
