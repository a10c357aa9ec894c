"""Plugins of strangers, good and broken: a module and the metadata of a distribution on `sys.path`."""

import textwrap
from dataclasses import asdict

import pytest

import rlvr
from rlvr.backends.hf.backend import HFBackend
from rlvr.backends.protocol import PROTOCOL_VERSION
from rlvr.environments.base import Environment
from rlvr.errors import (
    BackendUnavailableError,
    ConfigError,
    DuplicatePluginError,
    ModelError,
    PluginLoadError,
    UnknownPluginError,
)
from rlvr.plugins.manager import (
    announced_by,
    environment_options,
    list_backends,
    list_environments,
    load_backend,
    load_environment,
)
from rlvr.rewards.rubric import Rubric

GOOD_BACKEND = f"""
    from rlvr import hookimpl

    class Backend:
        protocol_version = {PROTOCOL_VERSION}
        def _nothing(self, *args, **kwargs): ...
        capabilities = load_policy = apply_lora = training_arguments = for_training = _nothing
        for_inference = save = load_saved = memory_in_use = _nothing

    @hookimpl
    def rlvr_backend():
        return Backend()
"""

GOOD_ENVIRONMENT = """
    from rlvr import Environment, Rubric, hookimpl

    def reward(trajectory):
        return 1.0

    @hookimpl
    def rlvr_environment(levels: int = 3, prompt: str = "hello", variant: str | None = None):
        rows = [{"question": prompt, "level": levels, "variant": variant}]
        return Environment(name="stranger", train_dataset=rows, rubric=Rubric(reward))
"""


@pytest.fixture
def install(tmp_path, monkeypatch):
    """`install("mine", code)`: a distribution `mine-plugin 1.2` whose plugin module is `code`."""
    count = 0

    def install(name, code, *, group="rlvr.backends", distribution=None):
        nonlocal count
        count += 1
        distribution = distribution or f"{name}-plugin"
        module = f"stranger_{tmp_path.name.replace('-', '_')}_{count}"
        site = tmp_path / f"site{count}"
        metadata = site / f"{distribution.replace('-', '_')}-1.2.dist-info"
        metadata.mkdir(parents=True)
        (site / f"{module}.py").write_text(textwrap.dedent(code))
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.2\n")
        (metadata / "entry_points.txt").write_text(f"[{group}]\n{name} = {module}\n")
        monkeypatch.syspath_prepend(str(site))
        return distribution

    return install


@pytest.fixture
def install_environment(install):
    return lambda name, code: install(name, code, group="rlvr.environments")


def row(rows, name):
    return next(status for status in rows if status.name == name)


def test_a_strangers_backend_is_listed_and_loaded_by_its_name(install):
    install("goodone", GOOD_BACKEND)
    assert asdict(row(list_backends(), "goodone")) == {
        "name": "goodone",
        "distribution": "goodone-plugin",
        "version": "1.2",
        "available": True,
        "reason": None,
    }
    backend = load_backend("goodone")
    assert type(backend).__name__ == "Backend"
    assert load_backend("goodone") is backend
    assert load_backend(backend) is backend


def test_the_projects_own_backends_come_in_through_the_same_door():
    rows = {status.name: status for status in rlvr.list_backends()}
    assert {"hf", "unsloth"} <= set(rows)
    assert rows["hf"].available
    assert rows["hf"].distribution == "rlvr"
    assert rows["hf"].version == rlvr.__version__
    assert list(rows) == sorted(rows)


def test_the_default_backend_comes_from_the_environment_variable(install, monkeypatch):
    install("fromvariable", GOOD_BACKEND)
    monkeypatch.setenv("RLVR_BACKEND", "fromvariable")
    assert load_backend() is load_backend("fromvariable")
    monkeypatch.delenv("RLVR_BACKEND")
    assert load_backend() is load_backend("hf")


BROKEN = {
    "raises on import": ("1 / 0", "ZeroDivisionError: division by zero"),
    "exits on import": ("import sys; sys.exit('no')", "SystemExit: no"),
    "is no Python": ("def :", "SyntaxError"),
    "needs a missing package": (
        "import no_such_package_at_all",
        "distribution that has 'no_such_package_at_all'",
    ),
    "misspelt hook": (GOOD_BACKEND.replace("def rlvr_backend", "def rlvr_backends"), "rlvr_backends"),
    "no hook": (
        "def rlvr_backend():\n    return 1",
        "has no function rlvr_backend marked with @rlvr.hookimpl",
    ),
    "hook with a parameter": (
        GOOD_BACKEND.replace("def rlvr_backend()", "def rlvr_backend(device)"),
        "every option needs a default",
    ),
    "availability raises": (
        GOOD_BACKEND + "\n    @hookimpl\n    def rlvr_backend_availability():\n        raise OSError('disk')\n",
        "rlvr_backend_availability raised OSError: disk",
    ),
    "availability is no reason": (
        GOOD_BACKEND + "\n    @hookimpl\n    def rlvr_backend_availability():\n        return False\n",
        "returned False; it must return None, or the reason",
    ),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_plugin_is_a_row_and_an_error_that_names_it_and_harms_nobody_else(install, fault):
    code, cause = BROKEN[fault]
    name = "broken-" + fault.replace(" ", "-")
    install(name, code)
    install(f"neighbour-of-{name}", GOOD_BACKEND)
    status = row(list_backends(), name)
    assert not status.available
    assert cause in status.reason
    with pytest.raises(PluginLoadError) as raised:
        load_backend(name)
    assert cause in str(raised.value)
    assert f"'{name}' ({name}-plugin 1.2)" in str(raised.value)
    assert row(list_backends(), f"neighbour-of-{name}").available
    assert load_backend(f"neighbour-of-{name}").protocol_version == PROTOCOL_VERSION


WRONG_OBJECT = {
    "none": ("return Backend()", "return None", "is None without the method(s)"),
    "text": (
        "return Backend()",
        "return 'backend'",
        "an object of type str without the method(s) capabilities",
    ),
    "class": ("return Backend()", "return Backend", "is the class Backend; return an instance"),
    "method": ("= save = ", "= ", "without the method(s) save of ModelBackend"),
    "version": (
        f"protocol_version = {PROTOCOL_VERSION}",
        "protocol_version = 99",
        "was written for version 99",
    ),
    "raises": ("return Backend()", "raise ImportError('needs libfoo')", "ImportError: needs libfoo"),
}


@pytest.mark.parametrize("fault", WRONG_OBJECT)
def test_what_is_no_backend_is_refused_with_what_is_missing(install, fault):
    old, new, cause = WRONG_OBJECT[fault]
    assert old in GOOD_BACKEND
    name = f"wrong-{fault}"
    install(name, GOOD_BACKEND.replace(old, new))
    with pytest.raises(PluginLoadError) as raised:
        load_backend(name)
    assert cause in str(raised.value)
    assert f"{name}-plugin 1.2" in str(raised.value)


def test_a_wrong_protocol_version_names_both(install):
    install("oldone", GOOD_BACKEND.replace(f"protocol_version = {PROTOCOL_VERSION}", "protocol_version = 0"))
    with pytest.raises(PluginLoadError, match=rf"version 0 of .* this rlvr takes versions \d+ to {PROTOCOL_VERSION}"):
        load_backend("oldone")


def test_a_backend_of_another_version_is_told_so_and_not_of_methods_that_this_version_has():
    class Later:
        protocol_version = 99

    with pytest.raises(PluginLoadError, match=rf"version 99 of .* takes versions \d+ to {PROTOCOL_VERSION}") as raised:
        load_backend(Later())
    assert "method" not in str(raised.value)


@pytest.mark.parametrize(
    ("version", "says"),
    [(True, "written for version True"), (1.0, "written for version 1.0"), (None, "without protocol_version; state")],
)
def test_what_is_no_version_is_refused(version, says):
    class Unversioned(HFBackend):
        protocol_version = version

    with pytest.raises(PluginLoadError, match=says):
        load_backend(Unversioned())


def test_an_object_that_is_no_backend_is_refused_too():
    with pytest.raises(PluginLoadError, match=r"passed as an object is an object of type dict without"):
        load_backend({"not": "a backend"})


def test_errors_of_the_project_pass_through_a_plugin_unchanged(install):
    code = GOOD_BACKEND.replace("return Backend()", "from rlvr.errors import ModelError; raise ModelError('mine')")
    install("raisesours", code)
    with pytest.raises(ModelError, match=r"^mine$"):
        load_backend("raisesours")


def test_two_distributions_that_claim_one_name_are_both_named(install):
    install("twice", GOOD_BACKEND, distribution="first-claimant")
    install("twice", GOOD_BACKEND, distribution="second-claimant")
    with pytest.raises(DuplicatePluginError, match=r"first-claimant 1.2") as raised:
        load_backend("twice")
    assert "second-claimant 1.2" in str(raised.value)
    rows = [status for status in list_backends() if status.name == "twice"]
    assert {status.distribution for status in rows} == {"first-claimant", "second-claimant"}
    assert not any(status.available for status in rows)
    assert all("first-claimant" in status.reason and "second-claimant" in status.reason for status in rows)
    assert row(list_backends(), "hf").available


def test_an_unknown_name_gets_the_installed_ones_and_the_closest():
    with pytest.raises(UnknownPluginError) as raised:
        load_backend("unslot")
    message = str(raised.value)
    assert message.startswith("unknown backend 'unslot'; installed: hf, unsloth")
    assert "Did you mean 'unsloth'?" in message
    assert message.endswith("See 'rlvr backends'.")
    assert isinstance(raised.value, LookupError)


def test_a_backend_that_cannot_be_used_here_says_why(install):
    code = GOOD_BACKEND + (
        "\n    @hookimpl\n    def rlvr_backend_availability():\n        return 'no GPU. Rent one.'\n"
    )
    install("needsgpu", code)
    status = row(list_backends(), "needsgpu")
    assert (status.available, status.reason) == (False, "no GPU. Rent one.")
    with pytest.raises(BackendUnavailableError, match=r"no GPU. Rent one."):
        load_backend("needsgpu")


def test_a_plugin_is_not_imported_until_a_listing_or_a_load_asks_for_it(install, tmp_path):
    marker = tmp_path / "imported"
    install("lazyone", f"open({str(marker)!r}, 'w').close()\n" + textwrap.dedent(GOOD_BACKEND))
    install("otherone", GOOD_BACKEND)
    load_backend("otherone")
    assert not marker.exists()
    load_backend("lazyone")
    assert marker.exists()


def test_an_environment_is_made_with_its_options(install_environment):
    install_environment("optional", GOOD_ENVIRONMENT)
    assert row(list_environments(), "optional").available
    environment = load_environment("optional", levels=5)
    assert environment.train_dataset == [{"question": "hello", "level": 5, "variant": None}]
    assert load_environment("optional").train_dataset[0]["level"] == 3


def test_the_part_after_the_colon_is_the_variant(install_environment):
    install_environment("varied", GOOD_ENVIRONMENT)
    assert load_environment("varied:leg_counting").train_dataset[0]["variant"] == "leg_counting"
    assert load_environment("varied:a:b").train_dataset[0]["variant"] == "a:b"
    with pytest.raises(ConfigError, match=r"two variants"):
        load_environment("varied:a", variant="b")


def test_an_environment_without_variants_refuses_one(install_environment):
    install_environment(
        "single",
        GOOD_ENVIRONMENT.replace(", variant: str | None = None", "").replace(', "variant": variant', ""),
    )
    with pytest.raises(ConfigError, match=r"'single' has no variants; got single:other"):
        load_environment("single:other")


def test_unknown_options_are_refused_all_at_once_with_the_allowed_ones(install_environment):
    install_environment("strict", GOOD_ENVIRONMENT)
    with pytest.raises(ConfigError) as raised:
        load_environment("strict", level=1, colour="red")
    assert len(raised.value.problems) == 2
    assert "no option 'level'; it takes: levels, prompt, variant. Did you mean 'levels'?" in raised.value.problems[0]


def test_an_option_without_a_default_must_be_given(install_environment):
    install_environment("needy", GOOD_ENVIRONMENT.replace("(levels: int = 3", "(*, levels: int"))
    with pytest.raises(ConfigError, match=r"'needy' needs the option 'levels'"):
        load_environment("needy")
    assert load_environment("needy", levels=1).train_dataset[0]["level"] == 1


def test_an_environment_with_free_options_takes_anything(install_environment):
    code = GOOD_ENVIRONMENT.replace("variant: str | None = None", "**options").replace(
        '"variant": variant', "**options"
    )
    install_environment("free", code)
    assert load_environment("free:big", colour="red").train_dataset[0] == {
        "question": "hello",
        "level": 3,
        "colour": "red",
        "variant": "big",
    }


def test_options_can_be_looked_at_with_types_and_defaults(install_environment):
    install_environment("described", "from __future__ import annotations\n" + textwrap.dedent(GOOD_ENVIRONMENT))
    options = environment_options("described")
    assert list(options) == ["levels", "prompt", "variant"]
    assert (options["levels"].annotation, options["levels"].default) == (int, 3)


def test_an_environment_that_fails_to_start_names_its_distribution(install_environment):
    install_environment(
        "failing", GOOD_ENVIRONMENT.replace("rows = [", "raise ValueError('no rows')\n        rows = [")
    )
    with pytest.raises(
        PluginLoadError, match=r"'failing' \(failing-plugin 1.2\) could not be made: ValueError: no rows"
    ):
        load_environment("failing")


def test_what_is_no_environment_is_refused(install_environment):
    install_environment("notone", GOOD_ENVIRONMENT.replace("return Environment", "return dict"))
    with pytest.raises(PluginLoadError, match=r"returned an object of type dict; it must return an rlvr.Environment"):
        load_environment("notone")


def test_an_environment_object_is_returned_as_it_is():
    environment = Environment(name="mine", train_dataset=[{"question": "?"}], rubric=Rubric(lambda _: 1.0))
    assert load_environment(environment) is environment
    with pytest.raises(ConfigError, match=r"exists already: levels"):
        load_environment(environment, levels=3)


def test_unknown_environment():
    with pytest.raises(UnknownPluginError, match=r"unknown environment 'aritmetic'.*See 'rlvr environments'"):
        load_environment("aritmetic")


def test_who_announces_a_backend_and_an_environment_is_known_without_importing_them(install):
    install("mine", "raise RuntimeError")
    install("theirs", "raise RuntimeError", group="rlvr.environments", distribution="their-package")
    assert announced_by("mine", "theirs:hard") == {"mine-plugin": "1.2", "their-package": "1.2"}
    assert announced_by("hf", "an object's") == {"rlvr": rlvr.__version__}
