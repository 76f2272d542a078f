"""Dense decoders of transformers: their networks as units, equal with all experts and as copies, gathered again."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from moestro.convert.layers import convert_layers, every_expert
from moestro.convert.network import into_expert, of_expert
from moestro.convert.plan import load_conversion
from moestro.convert.run import dense_sites
from moestro.data import Batch
from moestro.hf import Hosted

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gpt2")
LLAMA = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
}
GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 4}
TOKENS = torch.randint(60, (4, 16), generator=torch.Generator().manual_seed(1))
SPLIT = "method={kind: split, widths: {kind: ratios, ratios: [1, 2, 1]}, top_k: 2, grouping: {kind: kmeans}, shared: 4}"
COPIES = "method={kind: upcycle, n_experts: 3, top_k: 2, granularity: 2}"


def hosted(family: str, **more: object) -> Hosted:
    torch.manual_seed(5)
    sizes = GPT2 if family == "gpt2" else LLAMA
    decoder = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, vocab_size=60, **{**sizes, **more}))
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.normal_(std=0.3)
    return Hosted(decoder).double().eval()


def batches() -> list[Batch]:
    one = torch.ones_like(TOKENS)
    return [Batch(TOKENS, TOKENS.roll(-1, 1), one, one)]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", [SPLIT, COPIES])
@pytest.mark.parametrize("stream", ["teacher", "student"])
def test_converted_blocks_are_the_dense_ones(family, method, stream):
    model = hosted(family)
    with torch.no_grad():
        want = model(TOKENS).logits
    before = {name: value.clone() for name, value in model.state_dict().items()}
    conversion = load_conversion(None, [method, f"stream={stream}"])
    made = list(convert_layers(model, dense_sites(model, None), conversion, batches))
    for one in made:
        one.site.replace(one.mixture.layer)
    assert len(model.moe_layers()) == 2 and all(one.figures["difference"]["relative"] < 1e-12 for one in made)
    with torch.no_grad():
        routed = model(TOKENS).logits
        if method == SPLIT:
            assert not torch.allclose(routed, want)
            with every_expert(model.moe_layers().values()):
                routed = model(TOKENS).logits
    torch.testing.assert_close(routed, want, rtol=1e-8, atol=1e-8)

    again = hosted(family)
    with torch.no_grad():
        for parameter in again.blocks.parameters():
            parameter.zero_()
    for one, site in zip(made, dense_sites(again, None), strict=True):
        into_expert(one.mixture.units().take(one.mixture.rows), site.module.expert)
    assert all(torch.equal(value, before[name]) for name, value in again.state_dict().items())


def test_a_network_of_another_library_is_read_as_it_computes():
    """GPT-2's matrices lie [in out] and have biases, its activation is the tanh approximation."""
    expert = hosted("gpt2").blocks[0].ffn.expert
    network, x = of_expert(expert), torch.randn(7, 16, dtype=torch.float64)
    assert network.activation == "gelu_tanh" and network.biased and network.out_bias is not None
    torch.testing.assert_close(network(x), expert(x), rtol=1e-9, atol=1e-9)


def test_an_activation_that_we_lack_is_refused():
    with pytest.raises(ValueError, match=r"activation QuickGELU.* allowed are silu, gelu, gelu_tanh, relu"):
        of_expert(hosted("llama", hidden_act="quick_gelu").blocks[0].ffn.expert)
