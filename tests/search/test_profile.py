"""The loss table: what is recorded, what is solved, and its file, in the first version, too."""

import hashlib
from dataclasses import replace

import numpy as np
import pytest
import torch

from ib_analysis import Profile
from ib_analysis.cache.plan import HeadPlan, Recent, Tier
from ib_analysis.cache.spec import ByteLimit, CacheSpec
from ib_analysis.errors import BudgetError, CorruptFileError, ProfileMismatchError, UnknownNameError
from ib_analysis.files import load_tensors, save_tensors
from ib_analysis.model.shape import CacheShape, LayerShape, cache_shape
from ib_analysis.replay.examples import make_examples
from ib_analysis.replay.replays import Replays
from ib_analysis.scorers import SCORERS
from ib_analysis.scorers.snapkv import SnapKV
from ib_analysis.search.calibration import calibrate
from ib_analysis.search.candidates import head_options

pytestmark = pytest.mark.slow

SPEC = CacheSpec(CacheShape((LayerShape(2, 8), LayerShape(2, 8, sliding_window=16))), Recent(1, 5, 1), SCORERS["value_aware"])
OPTIONS = (
    HeadPlan("kivi"),
    HeadPlan("kivi", (Tier(0.5, 2, 2),)),
    HeadPlan("kivi", (Tier(0.5, 4, 4),)),
    HeadPlan("kivi", (Tier(1.0, 4, 4),)),
)


def small_profile(spec=SPEC):
    prices = np.array([[4.0, 3.0, 2.0, 1.0], [8.0, 4.0, 2.0, 0.5]], dtype=np.float32)
    return unmeasured(np.repeat(prices[None], 6, axis=0), spec, 100, OPTIONS)


def unmeasured(prompt_prices, spec, length, options):
    known = {"model": "model", "spec": spec, "context_length": length, "prompts": 6, "settings": {"seed": 0}}
    return Profile.unmeasured(prompt_prices, options=options, **known)


def same(a, b):
    """Whether two profiles agree in every field."""
    tables = [name for name, value in vars(a).items() if isinstance(value, np.ndarray)]
    assert all(np.array_equal(getattr(a, name), getattr(b, name), equal_nan=True) for name in tables)
    return all(value == vars(b)[name] for name, value in vars(a).items() if name not in tables)


def rewritten(path, **changes):
    """The file with another header."""
    tensors, header = load_tensors(path)
    save_tensors(path, tensors, {**header, **changes})


def as_version_2(path):
    """The file as version 2 wrote it: mean prices, and in their place the losses that were measured."""
    tensors, header = load_tensors(path)
    measured = tensors["measured_prompts"] > 0
    losses = tensors["loss_bits"].where(measured, tensors["prompt_prices"].double().mean(0))
    header |= {"version": 2, "gradient_prompts": len(tensors["prompt_prices"])}
    save_tensors(path, {"loss_bits": losses, "measured": measured}, header)


def as_version_1(path):
    """The file as version 1 wrote it: other names, a standard error, and not one for what it measured."""
    as_version_2(path)
    tensors, header = load_tensors(path)
    tiers = [[{"share": tier.pop("token_share"), **tier} for tier in option["tiers"]] for option in header["options"]]
    header["options"] = [{**option, "tiers": renamed} for option, renamed in zip(header["options"], tiers)]
    header |= {"version": 1, "pinned": header.pop("recent"), "priced": header.pop("gradient_prompts")}
    assert header.pop("checks") == [] and header["pinned"].pop("quantized") == 0
    save_tensors(path, {**tensors, "error_bits": torch.zeros_like(tensors["loss_bits"])}, header)


def test_bytes_are_those_of_each_option():
    nbytes = small_profile().nbytes()
    assert nbytes.shape == (2, 4)  # the layer with a sliding window has no rows
    assert nbytes[0].tolist() == [option.nbytes(94, 8) for option in OPTIONS] == nbytes[1].tolist()
    assert nbytes[0, 0] == 0 and (np.diff(nbytes[0]) > 0).all()


def test_records_are_means_with_errors_over_the_prompts_left():
    profile = small_profile()
    profile.record(0, 2, np.array([1.0, 3.0, 2.0]))
    assert profile.loss_bits[0, 2] == 2.0 and profile.measured_prompts[0, 2] == 3
    assert profile.error_bits[0, 2] == pytest.approx(np.sqrt(1 / 3 - 1 / 6))  # half of six prompts
    profile.record(1, 1, np.array([5.0]))
    assert profile.error_bits[1, 1] == pytest.approx(5 * np.sqrt(1 - 1 / 6))
    profile.record(0, 2, np.arange(6.0))
    assert (profile.loss_bits[0, 2], profile.error_bits[0, 2], profile.measured_prompts[0, 2]) == (2.5, 0.0, 6)
    assert np.isnan(profile.loss_bits).sum() == 6 and profile.expected_bits[0, 2] == pytest.approx(2.5)


def test_plans_of_a_choice():
    assert small_profile().plans(np.array([1, 3])) == ((OPTIONS[1], OPTIONS[3]), None)


@pytest.mark.parametrize("share", [0.1, 0.2, 0.3, 0.5])
def test_the_choice_of_least_loss_within_the_limit(share):
    profile = small_profile()
    limit, nbytes = profile.limit(share), profile.nbytes()
    solution = profile.solve(limit)
    within = [(a, b) for a in range(4) for b in range(4) if nbytes[0, a] + nbytes[1, b] <= limit.spare]
    losses = profile.expected_bits
    assert solution.loss == min(losses[0, a] + losses[1, b] for a, b in within)
    assert solution.cost == nbytes[[0, 1], solution.choice].sum() <= limit.spare
    other = profile.solve(limit, -losses)
    assert other.loss == min(-losses[0, a] - losses[1, b] for a, b in within)


def test_a_limit_below_sinks_and_window_is_refused():
    with pytest.raises(BudgetError, match="sinks and windows take"):
        small_profile().limit(1 / 100)


def test_the_choice_stays_within_the_share_at_all_lengths():
    """Also where that of the context length alone would not."""
    lowered = 0
    for share in np.linspace(0.16, 0.6, 40):
        profile = small_profile(replace(SPEC, recent=Recent(1, 8, 8)))  # 8 tokens leave the window at once
        whole = profile.limit(float(share))
        solution, limit = profile.solve_at_all_lengths(whole, profile.solve)
        assert whole.excess(profile.plans(solution.choice)) == 0
        assert limit.nbytes <= whole.nbytes and (solution.choice == profile.solve(limit).choice).all()
        lowered += limit != whole
        assert (limit == whole) == (whole.excess(profile.plans(profile.solve(whole).choice)) == 0)
    assert lowered > 0


def test_nothing_but_sinks_and_window_ends_the_search():
    """All options of all heads: those that keep no token yet at this length would keep one at the next."""
    shape, options = CacheShape((LayerShape(8, 8),) * 2), tuple(head_options(("kivi", "rotated")))
    prices = np.array([[[2 - option.kept_share for option in options]] * 16], dtype=np.float32)
    spec = CacheSpec(shape, Recent(1, 1, 1), SCORERS["value_aware"])
    profile = unmeasured(prices, spec, 59, options)
    limit = ByteLimit(spec, 2 / 59, 59)
    assert limit.spare == 0 and profile.limit(2 / 59) == limit
    solution, _ = profile.solve_at_all_lengths(limit, profile.solve)
    assert profile.plans(solution.choice) == spec.null_plans


def test_round_trip(bench, tmp_path):
    path = tmp_path / "profile.safetensors"
    bench.profile.save(path)
    found = Profile.load(path)
    assert found.options == bench.profile.options and found.spec == bench.profile.spec
    assert same(found, bench.profile)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(CorruptFileError, match=r"profile\.safetensors"):
        Profile.load(path)


def test_a_scorer_is_saved_with_its_parameters_or_refused(tmp_path):
    path = tmp_path / "profile.safetensors"
    small_profile(replace(SPEC, scorer=SnapKV(window=16))).save(path)
    assert Profile.load(path).spec.scorer == SnapKV(window=16)
    before = path.read_bytes()

    def mine(module, query, keys, values, valid, scaling):
        return keys.square().sum(-1)

    with pytest.raises(UnknownNameError, match=r"mine .*has no name to be saved under"):
        small_profile(replace(SPEC, scorer=mine)).save(path)
    assert path.read_bytes() == before


def test_version_1(profile_v1, profile_v1_path):
    """Made by the version before, of `small_llama`; expected is what that version read from it."""
    assert profile_v1.spec == CacheSpec(CacheShape((LayerShape(2, 8),) * 2), Recent(1, 5, 1), SCORERS["value_aware"])
    assert profile_v1.options == tuple(head_options(("kivi", "rotated")))
    assert (profile_v1.context_length, profile_v1.prompts) == (111, 4)
    assert profile_v1.prompt_prices.shape == (4, 4, len(profile_v1.options))
    measured = profile_v1.measured_prompts == 4
    assert int(measured.sum()) == 43 and (profile_v1.measured_prompts[~measured] == 0).all()
    stored = load_tensors(profile_v1_path)[0]["loss_bits"].numpy()
    assert hashlib.sha256(stored.tobytes()).hexdigest()[:16] == "b8dfe92844145a14"
    assert (profile_v1.loss_bits[measured] == stored[measured]).all() and np.isnan(profile_v1.loss_bits[~measured]).all()
    np.testing.assert_allclose(profile_v1.price_bits, stored, rtol=1e-6)
    solution = profile_v1.solve(profile_v1.limit(1 / 4), np.where(measured, stored, np.inf))
    assert solution.choice.tolist() == [98, 99, 321, 204]
    assert (solution.loss, solution.cost, solution.dual_bound) == (2.0897368102877456, 2762, 2.0895926730808405)


@pytest.mark.parametrize("older", [as_version_1, as_version_2])
def test_older_versions_are_written_as_version_3(older, profile_v1, tmp_path):
    path = tmp_path / "profile.safetensors"
    profile_v1.save(path)
    assert same(Profile.load(path), profile_v1)
    assert load_tensors(path)[1]["version"] == 3
    older(path)
    found = Profile.load(path)
    found.prompt_prices = profile_v1.prompt_prices  # measured losses had been written over them
    assert same(found, profile_v1)


def test_version_1_has_what_our_rewriting_gives_it(profile_v1, profile_v1_path, tmp_path):
    path = tmp_path / "profile.safetensors"
    profile_v1.save(path)
    as_version_1(path)
    (written, header), (expected, expected_header) = load_tensors(path), load_tensors(profile_v1_path)
    assert header == expected_header
    assert written.keys() == expected.keys()
    assert torch.equal(written["measured"], expected["measured"])
    torch.testing.assert_close(written["loss_bits"], expected["loss_bits"], rtol=1e-6, atol=0)


def test_version_1_is_used_again(small_llama, small_prompts, tmp_path, monkeypatch):
    """No gradient is computed again, and what was measured stays so."""
    path = tmp_path / "profile.safetensors"
    spec = CacheSpec(cache_shape(small_llama.config), Recent(1, 5, 1), SCORERS["value_aware"])
    replays = Replays(small_llama, spec, make_examples(small_llama, None, small_prompts[:2]))
    with monkeypatch.context() as patch:  # the formats of then
        patch.setattr("ib_analysis.search.calibration.usable_formats", lambda replays: ["kivi", "rotated"])
        first = calibrate(replays, 111, settings={"question_aware": True}, path=path)
    first.record(1, 40, np.array([0.25, 0.5]))
    first.save(path)
    as_version_1(path)
    read = Profile.load(path)

    def work(*arguments):
        raise AssertionError("the gradient was asked again")

    monkeypatch.setattr("ib_analysis.search.calibration.gradient_losses", work)
    again = calibrate(replays, 111, settings={"question_aware": True}, path=path)
    assert same(again, read) and again.loss_bits[1, 40] == 0.375


@pytest.mark.parametrize("version", [0, 4, "2", None])
def test_another_version_is_refused_by_name(version, tmp_path):
    path = tmp_path / "profile.safetensors"
    small_profile().save(path)
    rewritten(path, version=version)
    with pytest.raises(ProfileMismatchError, match=rf"profile\.safetensors has format version {version}, not 3: calibrate again"):
        Profile.load(path)


@pytest.mark.parametrize(
    "changes",
    [
        {"context_length": 10**12},
        {"context_length": "long"},
        {"prompts": -1},
        {"options": []},
        {"options": [{"format": "kivi", "tiers": [{"token_share": 0.5, "key_bits": 1, "value_bits": 4}]}]},
        {"shape": 3},
        {"scorer": "no such scorer"},
        {"settings": None},
        {"checks": [[0.5, {}]]},
    ],
)
def test_a_header_that_does_not_fit_is_refused_by_name(changes, tmp_path):
    path = tmp_path / "profile.safetensors"
    small_profile().save(path)
    rewritten(path, **changes)
    with pytest.raises(ProfileMismatchError, match="other contents than a profile"):
        Profile.load(path)


def test_tables_that_do_not_fit_are_refused_by_name(tmp_path):
    path = tmp_path / "profile.safetensors"
    small_profile().save(path)
    tensors, header = load_tensors(path)
    for name, tensor in tensors.items():
        for other in (tensor.to(torch.int32), tensor[..., :-1], tensor[..., None], None):
            changed = {**tensors, name: other} if other is not None else {key: tensors[key] for key in tensors if key != name}
            save_tensors(path, {key: table.contiguous() for key, table in changed.items()}, header)
            with pytest.raises(ProfileMismatchError, match="other contents than a profile"):
                Profile.load(path)


def test_a_file_of_an_older_version_with_another_kind_of_numbers_is_refused(profile_v1_path, tmp_path):
    """These seal only the contents: one letter makes floats integers."""
    whole = profile_v1_path.read_bytes()
    assert b'"dtype":"F64"' in whole
    path = tmp_path / "profile.safetensors"
    path.write_bytes(whole.replace(b'"dtype":"F64"', b'"dtype":"I64"'))
    with pytest.raises(ProfileMismatchError, match="other contents than a profile"):
        Profile.load(path)
