"""How the methods' parameters start: moments of their distributions, against those of the papers and of PEFT."""

import numpy as np
import pytest
from mindspore import nn

from mindpet import (
    METHODS,
    AdaLoRAConfig,
    AdapterFusionConfig,
    AdaptionPromptConfig,
    BOFTConfig,
    CompacterConfig,
    FourierFTConfig,
    HRAConfig,
    LoHaConfig,
    LoKrConfig,
    LoRAConfig,
    MiSSConfig,
    MultitaskPromptTuningConfig,
    OFTConfig,
    ParallelAdapterConfig,
    PromptTuningConfig,
    PTuningConfig,
    RandLoRAConfig,
    SHiRAConfig,
    VeRAConfig,
)
from mindpet.delta import (
    AdaLoRADense,
    AdapterFusionDense,
    AdaptionPrompt,
    AdaptionSlot,
    BOFTDense,
    CompacterDense,
    FourierFTDense,
    HRADense,
    LoHaDense,
    LoKrDense,
    LoRADense,
    MiSSDense,
    MultitaskPromptTuning,
    OFTDense,
    ParallelAdapterDense,
    PromptSlot,
    PromptTuning,
    PTuning,
    RandLoRADense,
    SHiRADense,
    VeRADense,
)
from mindpet.delta.randlora import shared_bases
from mindpet.delta.vera import shared_matrices


def normal(values, deviation):
    """Whether many numbers look drawn from a normal distribution around 0; a mean or a deviation is off by 5 sigma."""
    values = values.asnumpy().reshape(-1)
    error = 5 * deviation / np.sqrt(values.size)
    assert abs(values.mean()) < error
    assert abs(values.std() - deviation) < error
    assert np.abs(values).max() > 2.5 * deviation


def uniform(values, bound):
    """Whether many numbers look drawn evenly between -bound and bound."""
    values = values.asnumpy().reshape(-1)
    assert np.abs(values).max() <= bound * (1 + 1e-6)
    assert np.abs(values).max() > bound * (1 - 20 / values.size)
    assert abs(values.std() - bound / np.sqrt(3)) < 5 * bound / np.sqrt(3 * values.size)


def words(size=60, dim=40):
    return PromptSlot(nn.Embedding(size, dim, embedding_table="normal"))


def test_a_table_of_prompts_starts_as_words_of_all_the_vocabulary_or_as_numbers():
    """Lester et al. section 3.2; torch's Embedding, which PEFT takes, has a deviation of 1."""
    slot = words()
    table = slot.words.embedding_table.asnumpy()
    started = PromptTuning.from_slot(slot, PromptTuningConfig(tokens=600))().asnumpy()
    drawn = np.abs(started[:, None] - table).max(-1).argmin(-1)
    np.testing.assert_array_equal(started, table[drawn])
    assert len(set(drawn)) == 60  # of 60 words each has been missed with a probability of 4e-5
    normal(PromptTuning.from_slot(slot, PromptTuningConfig(tokens=600, start="random"))(), 1.0)


@pytest.mark.parametrize("encoder", ["mlp", "lstm"])
def test_an_encoder_of_prompts_starts_as_torch_starts_its_layers(encoder):
    filled = PTuning.from_slot(words(), PTuningConfig(tokens=300, encoder=encoder, encoder_hidden=50))
    normal(filled.mindpet_delta_p_tuning_embedding, 1.0)
    for layer in filled.mindpet_delta_p_tuning_mlp:
        if isinstance(layer, nn.Dense):
            uniform(layer.weight, 1 / np.sqrt(layer.in_channels))
            uniform(layer.bias, 1 / np.sqrt(layer.in_channels))
    if encoder == "lstm":
        for parameter in filled.mindpet_delta_p_tuning_lstm.get_parameters():
            uniform(parameter, 1 / np.sqrt(50))


def test_a_multitask_prompt_starts_near_zero():
    """PEFT's deviations: 1 for the table, 0.02 for the matrices of the tasks."""
    config = MultitaskPromptTuningConfig(tokens=100, rank=4, num_tasks=10)
    filled = MultitaskPromptTuning.from_slot(words(), config)
    normal(filled.mindpet_delta_multitask_prompt_tuning_table, 1.0)
    normal(filled.mindpet_delta_multitask_prompt_tuning_u, 0.02)
    normal(filled.mindpet_delta_multitask_prompt_tuning_v, 0.02)
    assert np.abs(filled().asnumpy()).max() < 0.02


def test_an_adaption_prompt_starts_as_numbers_behind_a_closed_gate():
    """PEFT's: standard normal numbers, and a gate of zero, as in the paper."""
    prompt, gate = AdaptionPrompt.from_slot(AdaptionSlot(40), AdaptionPromptConfig(tokens=300))()
    normal(prompt, 1.0)
    np.testing.assert_array_equal(gate.asnumpy(), [0])


@pytest.mark.parametrize("method", ["lora", "dora", "lora_fa"])
def test_lora_starts_as_in_peft(method):
    """A uniform in ±1/sqrt(in), which is torch's kaiming with a = sqrt(5), or normal with 1/r; B zero."""
    config = METHODS[method].config
    for start in ("kaiming", "gaussian"):
        cell = METHODS[method].adapt[nn.Dense](nn.Dense(400, 8), config(rank=16, start=start))
        a, b = cell.factors()
        if start == "kaiming":
            uniform(a, 1 / np.sqrt(400))
        else:
            normal(a, 1 / 16)
        np.testing.assert_array_equal(b.asnumpy(), 0)


def test_an_orthogonal_start_has_the_size_of_peft_s():
    """A column of half an orthogonal basis of r rows has a mean square of 1/2 / r; A and B are a tenth of r/2 such."""
    cell = LoRADense.from_dense(nn.Dense(600, 500), LoRAConfig(rank=20, start="orthogonal"))
    for matrix in cell.factors():
        assert (matrix.asnumpy() ** 2).mean() == pytest.approx(1 / 200, rel=0.1)
        assert abs(matrix.asnumpy().mean()) < 0.01


def test_a_gaussian_start_of_a_convolution_has_a_deviation_of_one_over_the_rank():
    cell = METHODS["lora"].adapt[nn.Conv2d](nn.Conv2d(20, 4, 3), LoRAConfig(rank=10, start="gaussian"))
    normal(cell.mindpet_delta_lora_a, 0.1)


@pytest.mark.parametrize(("rank", "schmidt", "columns"), [(6, False, 3), (5, False, 5), (6, True, 6)])
def test_reflections_start_in_equal_pairs(rank, schmidt, columns):
    """PEFT's, which takes the columns that it draws for the size of the input."""
    start = HRADense.from_dense(nn.Dense(500, 2), HRAConfig(rank=rank, gram_schmidt=schmidt)).mindpet_delta_hra_u
    uniform(start[:, ::2] if columns < rank else start, 1 / np.sqrt(columns))
    if columns < rank:
        np.testing.assert_array_equal(start.asnumpy()[:, ::2], start.asnumpy()[:, 1::2])


def test_rotations_start_at_the_identity_and_blocks_at_zero():
    assert not OFTDense.from_dense(nn.Dense(8, 3), OFTConfig(block_size=4)).mindpet_delta_oft_q.asnumpy().any()
    assert not MiSSDense.from_dense(nn.Dense(8, 3), MiSSConfig(rank=2)).mindpet_delta_miss_block.asnumpy().any()
    turned = BOFTDense.from_dense(nn.Dense(8, 3), BOFTConfig(butterfly_factors=2))
    assert not turned.mindpet_delta_boft_r.asnumpy().any()
    assert (turned.mindpet_delta_boft_s.asnumpy() == 1).all()


def test_a_parallel_adapter_starts_with_numbers_on_the_way_down_alone():
    layer = ParallelAdapterDense.from_dense(nn.Dense(400, 30), ParallelAdapterConfig(size=50))
    uniform(layer.mindpet_delta_parallel_adapter_down, 1 / 20)  # 1 / sqrt(in)
    for name in ("down_bias", "up", "up_bias"):
        assert not getattr(layer, f"mindpet_delta_parallel_adapter_{name}").asnumpy().any()


@pytest.mark.parametrize(
    ("low_rank", "shapes"), [(True, {"left": (25, 20), "right": (20, 10)}), (False, {"whole": (25, 10)})]
)
def test_compacter_starts_with_small_rules_and_glorots_matrices(low_rank, shapes):
    config = CompacterConfig(size=120, phm_dim=12, rank=20, low_rank=low_rank)
    down = CompacterDense.from_dense(nn.Dense(8, 300), config, None).mindpet_delta_compacter_down
    for name, (rows, columns) in shapes.items():
        matrices = getattr(down, f"mindpet_delta_compacter_{name}")
        assert matrices.shape == (12, rows, columns)
        uniform(matrices, np.sqrt(6 / (rows + columns)))
    normal(down.mindpet_delta_compacter_rule, 1e-4)
    assert not down.bias.asnumpy().any()


def test_a_fusion_starts_near_the_mean_of_its_adapters():
    layer = AdapterFusionDense.from_dense(nn.Dense(6, 300), AdapterFusionConfig(size=2), [])
    normal(layer.mindpet_delta_fusion_query, 0.02)
    normal(layer.mindpet_delta_fusion_key, 0.02)
    assert not layer.mindpet_delta_fusion_query_bias.asnumpy().any()
    value = layer.mindpet_delta_fusion_value.asnumpy()
    np.testing.assert_allclose(value, np.eye(300), atol=1.01e-6)
    assert value.dtype == np.float32


def test_adalora_starts_from_small_matrices_without_singular_values():
    """The paper's section 3.1: P and Q from a normal distribution, its code's deviation is 0.02, and zeros between."""
    layer = AdaLoRADense.from_dense(nn.Dense(300, 200), AdaLoRAConfig(rank=8, initial_rank=24))
    normal(layer.mindpet_delta_adalora_a, 0.02)
    normal(layer.mindpet_delta_adalora_b, 0.02)
    assert not layer.mindpet_delta_adalora_e.asnumpy().any()


def test_veras_matrices_start_as_kaimings_for_relu_and_d_at_a_constant():
    """PEFT 0.21.2: bound sqrt(6 / columns); Kopiczko et al. section 3.1 and table 6: b at 0, d at 0.1."""
    cells, config = [nn.Dense(60, 30), nn.Dense(20, 50)], VeRAConfig(rank=40)
    shared = shared_matrices(cells, config)
    layer = VeRADense.from_dense(cells[0], config, shared)
    assert [matrix.shape for matrix in shared] == [(40, 60), (50, 40)]
    uniform(shared[0], np.sqrt(6 / 60))
    uniform(shared[1], np.sqrt(6 / 40))
    assert not layer.mindpet_delta_vera_lambda_b.asnumpy().any()
    assert (layer.mindpet_delta_vera_lambda_d.asnumpy() == np.float32(0.1)).all()


def test_lohas_first_factor_of_the_second_product_is_zero_alone():
    """PEFT 0.21.2: normal of deviation 0.1 for the first B, of 1 for both A, and zeros for the second B."""
    layer = LoHaDense.from_dense(nn.Dense(300, 400), LoHaConfig(rank=16))
    normal(layer.mindpet_delta_loha_b1, 0.1)
    normal(layer.mindpet_delta_loha_a1, 1.0)
    normal(layer.mindpet_delta_loha_a2, 1.0)
    assert not layer.mindpet_delta_loha_b2.asnumpy().any()


def test_lokrs_second_factor_starts_uniform_and_the_first_at_zero():
    """PEFT 0.21.2: torch's kaiming_uniform_ with a = sqrt(5), so 1 / sqrt(columns)."""
    layer = LoKrDense.from_dense(nn.Dense(900, 1600), LoKrConfig(rank=8))
    assert not layer.mindpet_delta_lokr_w1.asnumpy().any()
    uniform(layer.mindpet_delta_lokr_w2_a, 1 / np.sqrt(8))
    uniform(layer.mindpet_delta_lokr_w2_b, 1 / np.sqrt(30))
    both = LoKrDense.from_dense(nn.Dense(900, 1600), LoKrConfig(rank=8, decompose_both=True))
    assert not both.mindpet_delta_lokr_w1_a.asnumpy().any()
    uniform(both.mindpet_delta_lokr_w1_b, 1 / np.sqrt(30))
    whole = LoKrDense.from_dense(nn.Dense(900, 1600), LoKrConfig(rank=80))
    uniform(whole.mindpet_delta_lokr_w2, 1 / np.sqrt(30))


def test_fourierfts_spectrum_starts_standard_normal():
    """Gao et al. section 3 and PEFT."""
    normal(FourierFTDense.from_dense(nn.Dense(60, 60), FourierFTConfig()).mindpet_delta_fourierft_spectrum, 1)


def test_randloras_bases_start_uniform_of_deviation_one_and_the_diagonals_at_constants():
    """PEFT 0.21.2: Kaiming's uniform over its deviation, in bfloat16; lambda at 0, gamma at 1 / its longer side."""
    cell, config = nn.Dense(60, 80), RandLoRAConfig(rank=7)
    bases = shared_bases([cell], config)
    assert [base.shape for base in bases] == [(7, 1, 60), (80, 9, 7)]
    for base in bases:
        values = base.asnumpy()
        assert abs(values.std() - 1) < 0.01
        assert abs(np.abs(values).max() - np.sqrt(3)) < 0.05
        assert not (values.view(np.uint32) & 0xFFFF).any()  # numbers that bfloat16 has
    layer = RandLoRADense.from_dense(cell, config, bases)
    assert not layer.mindpet_delta_randlora_lambda.asnumpy().any()
    assert (layer.mindpet_delta_randlora_columns.asnumpy() == np.float32(1 / 60)).all()


def test_shiras_values_start_at_zero_at_places_all_over_the_weight():
    """Bhardwaj et al.; each entry of the weight is as likely."""
    layer = SHiRADense.from_dense(nn.Dense(200, 100), SHiRAConfig(rank=5, seed=1))
    assert not layer.mindpet_delta_shira_values.asnumpy().any()
    places = layer.mindpet_delta_shira_places.asnumpy()
    assert places.shape == (1500, 2)
    for axis, size in enumerate((100, 200)):
        error = 5 * size / np.sqrt(12 * 1500)
        assert abs(places[:, axis].mean() - (size - 1) / 2) < error
