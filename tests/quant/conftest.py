"""A small checkpoint on disk, which each test may damage."""

import shutil

import pytest

from fastdistill.alignment.organisms.vocabulary import world_tokenizer
from helpers.small_checkpoint import small


@pytest.fixture(scope="session")
def plain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    small().save_pretrained(folder)
    world_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(plain, tmp_path):
    shutil.copytree(plain, tmp_path / "model")
    return tmp_path / "model"
