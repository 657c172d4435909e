"What several test files use."
import pytest

@pytest.fixture(scope="session")
def rehearsed(tmp_path_factory):
    "The rehearsal of the `hub` profile, run once on this machine: a folder with its profile, and its runs in `local`."
    from distilltv.runner import run_stale
    from test_rehearsal import ROOT, rehearse
    at = tmp_path_factory.mktemp("rehearsal")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setenv("DISTILLTV_HOME", str(at/"local"))
        patch.setenv("DISTILLTV_DATASETS", str(at/"datasets"))
        assert run_stale(rehearse(at)) == {}
    return at
