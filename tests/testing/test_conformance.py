"""The conformance kit finds planted faults by name, and passes the backends that are right."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
import time
from textwrap import indent

import pytest
from faulty_backends import BACKEND_FAULTS, FAULTS_ALONE, LoadsAnotherCopy
from faulty_lora import LORA_FAULTS, DropsAlpha
from faulty_plugins import FAULTY_PLUGINS, PATCHES_ONLY_WHEN_FIRST
from faulty_quantized import QUANTIZED_FAULTS, EightIsFour
from faulty_saving import SAVING_FAULTS
from faulty_training import TRAINING_FAULTS

from rlvr.backends.hf.backend import HFBackend
from rlvr.backends.protocol import ExportFormat, LoraSettings, ModelSettings
from rlvr.cli import main
from rlvr.errors import ConfigError, UnknownPluginError
from rlvr.testing.conformance import CHECKS, GROUPS, backend_checks, check_backend, runner
from rlvr.testing.conformance.catalogue import PROCESSES, select
from rlvr.testing.conformance.context import Context
from rlvr.testing.conformance.runner import at_the_same_time, run_check

FAULTS = BACKEND_FAULTS | LORA_FAULTS | TRAINING_FAULTS | QUANTIZED_FAULTS | SAVING_FAULTS
has_unsloth = importlib.util.find_spec("unsloth") is not None


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_planted_fault_is_found_by_the_check_for_it(fault):
    report = check_backend(fault(), only=[FAULTS[fault]])
    (result,) = report.results
    assert not result.passed, f"not found; measured: {result.message}"
    assert not report.ok
    for accident in ("TypeError", "AttributeError", "NameError", "KeyError"):  # caught for what it is, not by accident
        assert accident not in result.message


@pytest.mark.parametrize(
    ("fault", "check", "finding"),
    [
        (EightIsFour, "setting-quantization", "8 have to be nearer"),
        (LoadsAnotherCopy, "log-probabilities", "differ from the float32 reference"),  # of the model asked for
    ],
)
def test_a_fault_is_found_for_what_it_is(fault, check, finding):
    (result,) = check_backend(fault(), only=[check]).results
    assert not result.passed
    assert finding in result.message


@pytest.mark.parametrize("fault", FAULTS_ALONE, ids=lambda fault: fault.__name__)
def test_a_fault_planted_for_a_check_with_its_own_process_is_found(fault, tmp_path, monkeypatch):
    """In this process all the same: `hf` changes none, and the Hub cache is set here as the runner sets it."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    name, finding = FAULTS_ALONE[fault]
    (check,) = select([name])
    result = run_check(check, Context(None, fault(), None, "cpu", tmp_path))
    assert not result.passed, f"not found; measured: {result.message}"
    assert finding in result.message


def test_every_check_has_a_planted_fault():
    planted = {*FAULTS.values(), *(check for check, _ in FAULTS_ALONE.values())}
    assert planted | {plugin.check for plugin in FAULTY_PLUGINS.values()} == {check.name for check in CHECKS}


def test_every_setting_and_every_export_format_has_a_check():
    names = {check.name for check in CHECKS}
    beside = {"setting-gpu-memory-utilization", "lora-alpha-multiplier"}  # within fast-inference, and within alpha
    for prefix, settings in (("setting-", ModelSettings), ("lora-", LoraSettings)):
        fields = {prefix + field.name.replace("_", "-") for field in dataclasses.fields(settings)}
        assert fields - beside <= names
    assert {f"export-{export_format}" for export_format in ExportFormat.__args__} <= names
    assert {check.group for check in CHECKS} == set(GROUPS) == {group for groups in PROCESSES for group in groups}


@pytest.mark.both
@pytest.mark.timeout(900)
def test_hf_passes_every_check(capsys):
    """End to end: the command, each group in a child process."""
    if has_unsloth:  # a few, on the other set of versions
        assert check_backend(
            "hf", only=["trains-adapter-only", "sampler-is-policy", "resumes", "export-merged-16bit"]
        ).ok
        return
    with pytest.raises(SystemExit) as stop:
        main(["backends", "check", "hf", "--json", "--jobs", "2"])
    report = json.loads(capsys.readouterr().out)
    assert [row["message"] for row in report["results"] if not row["passed"]] == []
    assert not stop.value.code
    assert [row["name"] for row in report["results"]] == [check.name for check in CHECKS]


@pytest.mark.unsloth
@pytest.mark.timeout(900)
@pytest.mark.skipif(not has_unsloth, reason="the unsloth package is not installed in this environment")
def test_unsloth_passes_every_check():
    report = check_backend("unsloth")
    assert report.ok, str(report)
    assert len(report.results) == len(CHECKS)


def test_a_backend_object_is_checked_in_this_process_without_what_needs_a_fresh_one():
    seen = []
    report = check_backend(HFBackend(), only=["plugin", "lora-r", "alone"], on_result=seen.append)
    assert [result.name for result in report.results] == ["lora-r"]
    assert seen == list(report.results)
    assert report.ok


def test_a_model_that_is_not_there_is_not_replaced_by_a_tiny_one():
    (result,) = check_backend(HFBackend(), model="/nowhere", only=["tokenizer"]).results
    assert not result.passed
    assert "'/nowhere' does not exist" in result.message


def test_unknown_checks_and_backends_are_refused():
    with pytest.raises(ConfigError, match=r"unknown check 'dtypes'; groups: plugin"):
        check_backend("hf", only=["dtypes"])
    with pytest.raises(UnknownPluginError, match="unknown backend 'hff'"):
        check_backend("hff")


@pytest.mark.parametrize("timeout", ["-1", "0", "nan"])
def test_options_that_cannot_be_are_refused_and_not_blamed_on_the_backend(capsys, timeout):
    with pytest.raises(SystemExit) as stop:
        main(["backends", "check", "hf", "--device", "tpu", "--timeout", timeout, "--jobs", "0"])
    assert stop.value.code == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    for words in ("device is 'tpu'; allowed: cpu, cuda", f"timeout_s is {timeout}; it must be", "jobs is 0"):
        assert words in shown.err


def meet(barrier, names):
    """Gives the names, each once so many sources as `barrier` is for have come as far."""
    for name in names:
        barrier.wait(timeout=10)
        yield name


def test_sources_are_read_at_the_same_time():
    barrier = threading.Barrier(2)
    found = list(at_the_same_time([meet(barrier, "ab"), meet(barrier, "cd")], 2, threading.Event()))
    assert sorted(found) == ["a", "b", "c", "d"]
    assert [name for name in found if name in "ab"] == ["a", "b"]


def test_one_at_a_time_is_one_after_the_other():
    running = []

    def source(name):
        running.append(name)
        yield name
        running.remove(name)

    for _ in at_the_same_time(map(source, "abc"), 1, threading.Event()):
        assert len(running) == 1


def test_where_one_source_fails_or_nobody_listens_all_are_ended():
    ended = []

    def endless(name, barrier):
        barrier.wait(timeout=10)
        try:
            while True:
                yield name
                time.sleep(0.001)
        finally:
            ended.append(name)

    def broken(barrier):
        barrier.wait(timeout=10)
        raise OSError("no space left")
        yield

    all_run = threading.Barrier(3)
    with pytest.raises(OSError, match="no space left"):
        list(at_the_same_time([endless("a", all_run), broken(all_run), endless("b", all_run)], 3, threading.Event()))
    assert sorted(ended) == ["a", "b"]
    ended.clear()
    both_run = threading.Barrier(2)
    found = at_the_same_time([endless("a", both_run), endless("b", both_run)], 2, threading.Event())
    next(found)
    found.close()
    assert sorted(ended) == ["a", "b"]


@pytest.mark.parametrize("check", backend_checks(HFBackend(), only=["lora-seed", "memory-in-use"]))
def test_checks_as_a_parametrised_test(check):
    check()


def test_the_parametrised_checks_have_names_and_fail_with_the_finding():
    (check,) = backend_checks(DropsAlpha(), only=["lora-alpha"])
    assert check.__name__ == "lora-alpha"
    with pytest.raises(AssertionError, match=r"lora-alpha.*scaled by 1, and LoadedPolicy.lora says 4 / 8 = 0.5"):
        check()


# Strangers' plugins, in processes of their own

PLUGIN = """
import os
from rlvr import hookimpl
{top}

class Backend:
    protocol_version = 1
    def capabilities(self):
        {capabilities}
    load_policy = apply_lora = training_arguments = for_training = for_inference = capabilities
    save = load_saved = memory_in_use = capabilities

@hookimpl
def rlvr_backend():
{load}
    return Backend()
"""


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """Installs a distribution with one backend, `stranger`; its parts are lines of code."""

    def install(*, top="", load="", capabilities="return None"):
        (tmp_path / "stranger_plugin.py").write_text(
            PLUGIN.format(top=top, load=indent(load or "pass", "    "), capabilities=capabilities)
        )
        info = tmp_path / "stranger-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: stranger\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text("[rlvr.backends]\nstranger = stranger_plugin\n")
        monkeypatch.syspath_prepend(tmp_path)

    yield install
    sys.modules.pop("stranger_plugin", None)


@pytest.mark.parametrize("fault", FAULTY_PLUGINS)
def test_a_fault_planted_in_a_plugin_is_found_by_the_check_for_it(fault, plugin):
    planted = FAULTY_PLUGINS[fault]
    plugin(top=planted.top, load=planted.load)
    (result,) = check_backend("stranger", only=[planted.check]).results
    assert not result.passed, f"not found; measured: {result.message}"
    for finding in planted.findings:
        assert finding in result.message


def test_a_plugin_that_comes_too_late_for_its_patches_passes_when_it_says_so(plugin):
    plugin(
        load=f"{PATCHES_ONLY_WHEN_FIRST}    warnings.warn('trl came first')\n"
        "    logging.getLogger('stranger').warning('%s came first, too', 'peft')"
    )
    (result,) = check_backend("stranger", only=["loads-late"]).results
    assert result.passed, result.message
    assert "trl came first" in result.message
    assert "peft came first, too" in result.message


def test_a_process_that_dies_is_a_failed_check_with_its_last_lines_and_the_rest_goes_on(plugin):
    plugin(capabilities="os.write(2, b'kernel panic\\n'); os._exit(7)")
    results = check_backend("stranger", only=["capabilities", "setting-seed"]).results
    assert [result.name for result in results] == ["capabilities", "setting-seed"]
    for result in results:
        assert not result.passed
        assert "exit code 7" in result.message
        assert "kernel panic" in result.message


@pytest.mark.parametrize("installed", [True, False])
def test_where_vllm_is_installed_its_check_runs_before_the_others(tmp_path, monkeypatch, installed):
    monkeypatch.setattr(runner, "find_spec", lambda name: name if installed else None)
    job, running = runner._Job("hf", None, None, tmp_path, 1.0), []
    beside_each_other = threading.Barrier(2)

    def run(share):
        running.append(share)
        if not (installed and share == "engine"):
            beside_each_other.wait(timeout=20)
        yield share
        running.remove(share)

    job.run = run
    shares = ["training", "saving", "engine"] if installed else ["training", "engine"]
    for found in job.all(shares, jobs=2):
        if installed and found == "engine":
            assert running == ["engine"]


INTERRUPTED = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
from rlvr.cli import main
main(["backends", "check", "stranger", *sys.argv[1:]])
"""


@pytest.mark.parametrize(
    ("where", "only", "jobs"),
    [("capabilities", "settings,training", 2), ("capabilities", "settings", 1), ("load", "loads-first,settings", 2)],
    ids=["two processes", "one process", "a process of a check"],
)
def test_an_interrupt_ends_every_process_at_once(plugin, tmp_path, where, only, jobs):
    hang = f"import os, time; open({str(tmp_path)!r} + f'/hangs-{{os.getpid()}}', 'w').close(); time.sleep(100)"
    plugin(**{where: hang})
    program = [sys.executable, "-c", INTERRUPTED, "--only", only, "--jobs", str(jobs)]
    path = os.pathsep.join(filter(None, sys.path))
    with subprocess.Popen(program, env={**os.environ, "PYTHONPATH": path}, stderr=subprocess.DEVNULL) as process:
        while len(hanging := list(tmp_path.glob("hangs-*"))) < jobs:
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        process.wait(timeout=20)  # it sleeps for 100
    states = [
        subprocess.run(["ps", "-o", "stat=", "-p", path.name.removeprefix("hangs-")], capture_output=True, text=True)
        for path in hanging
    ]
    assert all(state.stdout.strip() in ("", "Z") for state in states)  # gone, or dead and not yet waited for


def test_the_command_says_what_failed_and_exits_with_1(plugin, capsys):
    plugin(capabilities="raise RuntimeError('no device')")
    with pytest.raises(SystemExit) as stop:
        main(["backends", "check", "stranger", "--only", "capabilities"])
    assert stop.value.code == 1
    out = capsys.readouterr().out
    assert "FAILED" in out
    assert "RuntimeError: no device" in out
    assert "failed: capabilities" in out


def test_looking_at_the_command_loads_nothing_heavy():
    program = (
        "import sys; import rlvr.testing.conformance; from rlvr.cli import main\n"
        "try: main(['backends', 'check', '--help'])\nexcept SystemExit: pass\n"
        "print([name for name in ('torch', 'transformers', 'trl', 'peft', 'unsloth') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert result.stdout.splitlines()[-1] == "[]", result.stderr
