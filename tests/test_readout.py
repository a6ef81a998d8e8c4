"""Which number of an answer is explained: checked against the model's own answer, and refused where it isn't clear."""

import numpy as np
import pytest
import torch
import transformers
from models import IDS, PICTURES, TEXT, VISION, perturbed, tiny_bert
from torch import nn

from libragrad_minimal import attribute

MASK = torch.tensor([[1, 1, 1, 1, 1, 0, 0, 0, 0], [1] * 9])


def test_rows_of_texts():
    model = tiny_bert()
    inputs = {"input_ids": IDS, "attention_mask": MASK}
    logits = model(**inputs).logits.detach()
    expected = {
        3: logits[:, 3, 42],
        -6: logits[:, 3, 42],
        "last": torch.stack([logits[0, 4, 42], logits[1, 8, 42]]),
        torch.tensor([2, 7]): torch.stack([logits[0, 2, 42], logits[1, 7, 42]]),
        MASK.bool(): torch.stack([logits[0, :5, 42].mean(), logits[1, :, 42].mean()]),
    }
    for readout, output in expected.items():
        result = attribute(model, inputs, 42, readout=readout)
        torch.testing.assert_close(result.output, output)
        assert (result.completeness_error < 1e-5 * (1 + output.abs())).all()
    by_row = attribute(model, inputs, lambda row: row[:, 42], readout=3)
    whole = attribute(model, inputs, lambda answer: answer[:, 3, 42])
    torch.testing.assert_close(by_row.scores, whole.scores)


def test_rows_of_padding_are_refused():
    with pytest.raises(ValueError, match="row 8 of sample 0, which is padding"):
        attribute(tiny_bert(), {"input_ids": IDS, "attention_mask": MASK}, 42, readout=-1)


def test_queries_and_pixels():
    config = transformers.YolosConfig(**{**VISION, "image_size": [32, 32]}, num_detection_tokens=4, num_labels=5)
    yolos = perturbed(transformers.YolosForObjectDetection(config))
    torch.testing.assert_close(
        attribute(yolos, PICTURES, 1, readout=2).output, yolos(PICTURES).logits[:, 2, 1].detach()
    )

    class Segmenter(nn.Module):
        def __init__(self):
            super().__init__()
            self.vit = transformers.ViTModel(transformers.ViTConfig(**VISION), add_pooling_layer=False)
            self.head = nn.Linear(32, 5)

        def forward(self, x):
            return self.head(self.vit(x).last_hidden_state[:, 1:]).transpose(1, 2).unflatten(2, (4, 4))

    model = perturbed(Segmenter())
    answer = model(PICTURES).detach()
    mask = torch.zeros(4, 4, dtype=torch.bool)
    mask[1:3, 2:] = True
    for readout, output in (((3, 1), answer[:, 2, 3, 1]), (mask, answer[:, 2, 1:3, 2:].mean((1, 2)))):
        result = attribute(model, PICTURES, 2, readout=readout)
        torch.testing.assert_close(result.output, output)
        assert (result.completeness_error < 1e-5 * (1 + output.abs())).all()


def test_models_that_generate_are_read_at_the_last_token():
    config = transformers.LlamaConfig(**TEXT, num_key_value_heads=2)
    model = perturbed(transformers.LlamaForCausalLM(config))
    logits = model(IDS, attention_mask=MASK).logits.detach()
    inputs = {"input_ids": IDS, "attention_mask": MASK}
    expected = torch.stack([logits[0, 4, 7], logits[1, 8, 7]])
    torch.testing.assert_close(attribute(model, inputs, 7).output, expected)
    assert (attribute(model, inputs, 7).scores[0, 5:] == 0).all()
    torch.testing.assert_close(attribute(model, IDS, 7, readout=3).output, model(IDS).logits[:, 3, 7].detach())


def test_logits_of_other_positions_are_not_computed():
    shapes = []
    config = transformers.LlamaConfig(**TEXT, num_key_value_heads=2)
    model = perturbed(transformers.LlamaForCausalLM(config))
    model.lm_head.register_forward_hook(lambda module, args, result: shapes.append(tuple(result.shape)))
    attribute(model, IDS, 7)
    attribute(model, {"input_ids": IDS, "attention_mask": MASK}, 7)
    looked_round = (2, 1, 200)  # once for each kind of inputs
    assert shapes == [looked_round, (2, 1, 200), looked_round, (2, 2, 200)]


def test_towers_without_logits():
    tower = perturbed(
        transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(**VISION, projection_dim=6))
    )
    direction = torch.randn(2, 6)
    result = attribute(tower, PICTURES, direction)
    torch.testing.assert_close(result.output, (tower(PICTURES).image_embeds * direction).sum(1).detach())
    dino = perturbed(transformers.Dinov2Model(transformers.Dinov2Config(**VISION)))
    result = attribute(dino, PICTURES, lambda answer: answer.last_hidden_state[:, 1:].mean((1, 2)))
    torch.testing.assert_close(result.output, dino(PICTURES).last_hidden_state[:, 1:].mean((1, 2)).detach())
    assert (result.completeness_error < 1e-4 * (1 + result.output.abs())).all()
    row = attribute(dino, PICTURES, torch.ones(32), readout=0)
    torch.testing.assert_close(row.output, dino(PICTURES).last_hidden_state[:, 0].sum(1).detach())


def test_pairs_explain_the_picture_for_given_texts():
    text = {**TEXT, "bos_token_id": 0, "eos_token_id": 1}
    model = perturbed(
        transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=VISION, projection_dim=6))
    )
    inputs = {"input_ids": IDS.repeat(2, 1)[:3], "pixel_values": PICTURES}
    result = attribute(model, inputs, 2)
    torch.testing.assert_close(result.output, model(**inputs).logits_per_image[:, 2].detach())
    assert result.grid == (4, 4) and (result.completeness_error < 1e-4 * (1 + result.output.abs())).all()


@pytest.mark.parametrize("wrapped", ["number", "dict"])
def test_answers_of_other_shapes(wrapped):
    inner = perturbed(transformers.ViTForImageClassification(transformers.ViTConfig(**VISION, num_labels=5)))

    class Wrapper(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            logits = self.inner(x).logits
            return logits[:, 1] if wrapped == "number" else {"logits": logits}

    expected = attribute(inner, PICTURES, 1)
    for target in (None, 0) if wrapped == "number" else (1,):
        torch.testing.assert_close(attribute(Wrapper().eval(), PICTURES, target).scores, expected.scores)


@pytest.mark.parametrize(
    "build, options, message",
    [
        (tiny_bert, dict(target=3), r"9 rows of 200 numbers.*readout=3.*function"),
        (tiny_bert, dict(target=3, readout=9), "row 9, and the answer has 9 rows"),
        (tiny_bert, dict(target=3, readout=torch.zeros(9, dtype=torch.bool)), "mask of readout is empty"),
        (tiny_bert, dict(target=3, readout=torch.ones(8, dtype=torch.bool)), "9 places, and the mask is"),
        (tiny_bert, dict(target=3, readout="cls"), "unknown readout 'cls'.*readout='last'"),
        (tiny_bert, dict(target=3, readout=2.5), "holds no row's number.*2.5"),
        (tiny_bert, dict(target=3, readout={"row": 2}), "readout is a dict"),
        (tiny_bert, dict(target=3, readout=[2, 3, 4]), r"one for each of 2 samples; got shape \(3,\)"),
        (
            tiny_bert,
            dict(target=lambda answer: answer[:, 0]),
            r"one number per sample \(2,\), got \(2, 200\)",
        ),
    ],
)
def test_unclear_readouts_are_refused(build, options, message):
    with pytest.raises(ValueError, match=message):
        attribute(build(), IDS, **options)


def test_one_class_needs_no_target():
    model = perturbed(transformers.BertForSequenceClassification(transformers.BertConfig(**TEXT, num_labels=1)))
    assert torch.equal(attribute(model, IDS, None).scores, attribute(model, IDS, 0).scores)


def test_labels_among_the_inputs():
    model = perturbed(transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXT)))
    with_labels = attribute(model, {"input_ids": IDS, "labels": IDS}, 3)
    torch.testing.assert_close(with_labels.scores, attribute(model, IDS, 3).scores)


def test_a_tower_without_a_vector_asks_for_a_function():
    vit = perturbed(transformers.ViTModel(transformers.ViTConfig(**VISION), add_pooling_layer=False))
    with pytest.raises(ValueError, match="no logits but last_hidden_state.*function"):
        attribute(vit, PICTURES, 1)


def test_masks_of_rows_come_as_lists_and_arrays_too():
    """With as many texts as rows, a list of truth values mustn't be taken for a number a sample."""
    model, texts, mask = tiny_bert(), IDS.repeat(5, 1)[:9], [i in (2, 4) for i in range(9)]
    expected = model(texts).logits[:, [2, 4], 3].mean(1).detach()
    for form in (mask, np.array(mask), torch.tensor(mask)):
        torch.testing.assert_close(attribute(model, texts, 3, "IxG", readout=form).output, expected)
    padded = {"input_ids": IDS, "attention_mask": (torch.arange(9) < 5) | torch.tensor([[False], [True]])}
    with pytest.raises(ValueError, match="covers padding of sample 0"):
        attribute(model, padded, 3, readout=torch.ones(9, dtype=torch.bool))


class Prompted(nn.Module):
    """Three learned tokens before the text, and a row of the answer for each of them as well."""

    def __init__(self):
        super().__init__()
        self.embed, self.prompt, self.head = nn.Embedding(200, 16), nn.Parameter(torch.zeros(3, 16)), nn.Linear(16, 5)
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(16, 2, 24, batch_first=True) for _ in range(2))

    def forward(self, input_ids, attention_mask=None):
        h = torch.cat([self.prompt.expand(len(input_ids), -1, -1), self.embed(input_ids)], 1)
        for block in self.blocks:
            h = block(h)
        return self.head(h)


@pytest.mark.parametrize("readout, row", [("last", 11), (-1, 11), (11, 11), (2, 2)])
def test_rows_before_the_text_count(readout, row):
    model = perturbed(Prompted())
    result = attribute(model, IDS, 1, "IxG", readout=readout)
    torch.testing.assert_close(result.output, model(IDS)[:, row, 1].detach())
    padded = {"input_ids": IDS, "attention_mask": torch.arange(9).expand(2, -1) < 8}
    with pytest.raises(ValueError, match="12 rows to a text of 9 tokens"):
        attribute(model, padded, 1, readout="last")
