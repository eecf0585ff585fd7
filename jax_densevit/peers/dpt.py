"""DPT of Hugging Face's transformers, without the layers that it owns and never needs."""

import torch
from torch import nn
from transformers import DPTConfig, DPTForSemanticSegmentation


class Dpt(nn.Module):
    """`[B, 3, H, H]` -> logits `[B, K, H, H]`, in training [logits, auxiliary logits `[B, K, H / 2, H / 2]`].

    transformers' own forward pass runs the auxiliary head outside training too and drops what it says. Here it runs in
    training alone, as ours does.

    Args:
      model: ours (`models.dpt.Dpt`), a segmentation model without a stem, for square images.
    """

    def __init__(self, model):
        super().__init__()
        config = DPTConfig(
            image_size=model.image_size[0],
            patch_size=model.patch_size,
            hidden_size=model.hidden_size,
            num_hidden_layers=model.num_layers,
            num_attention_heads=model.num_heads,
            intermediate_size=model.mlp_size,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            layer_norm_eps=model.norm_epsilon,
            num_labels=model.num_classes,
            backbone_out_indices=[tap - 1 for tap in model.head_taps],
            readout_type=model.readout,
            neck_hidden_sizes=list(model.reassemble),
            fusion_hidden_size=model.features,
            use_batch_norm_in_fusion_residual=model.batch_norm,
            semantic_classifier_dropout=model.head_dropout,
        )
        self.whole = DPTForSemanticSegmentation(config)
        self.taps = model.head_taps
        self.whole.auxiliary_head.head[3].p = model.head_dropout  # always 0.1, whatever the configuration says
        self.whole.dpt.layernorm = nn.Identity()  # of the last tokens, which no level takes
        self.whole.neck.fusion_stage.layers[0].residual_layer1 = None  # the deepest fusion adds nothing to its map

    def forward(self, images: torch.Tensor) -> torch.Tensor | list[torch.Tensor]:
        states = self.whole.dpt(images, output_hidden_states=True).hidden_states
        maps = self.whole.neck([states[tap] for tap in self.taps])
        logits = self.whole.head(maps)
        return [logits, self.whole.auxiliary_head(maps[-1])] if self.training else logits
