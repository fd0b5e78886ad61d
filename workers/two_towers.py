"""A model of two towers, one for pictures and one for texts, as a classifier: CLIP, asked by prompts.

The classes of a task are texts, each label's name in the task's prompt; a picture's logits are its similarities to
them. So a task has no head: what a label means, the text tower says, and labels that nobody was trained on can be
asked for too. Both towers take LoRAs.

Axes: S pictures, L labels, T tokens, E numbers of a vector that both towers write.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn.functional import cross_entropy, normalize
from transformers import CLIPModel
from transformers.modeling_outputs import ImageClassifierOutput

from configs.task_spec import TaskSpec
from workers.tokens import check_prompts, prompts_of


class PromptedClip(CLIPModel):  # type: ignore[misc]
    """CLIP that classifies pictures by its prompts. Layers and parameters are CLIPModel's, by the same names."""

    prompts: dict[str, Tensor]
    """Token ids and mask of each label's prompt, L×T."""

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None, **_: Any) -> ImageClassifierOutput:
        """Logits S×L, and with labels the loss of training."""
        logits_SL = self.picture_vectors(pixel_values) @ self.label_vectors(**self.prompts).T
        loss = None if labels is None else contrastive_loss(logits_SL, labels)
        return ImageClassifierOutput(loss=loss, logits=logits_SL)

    def picture_vectors(self, pixel_values: Tensor) -> Tensor:
        """Of unit length, S×E, float32."""
        vectors_SE: Tensor = normalize(self.get_image_features(pixel_values=pixel_values).pooler_output.float(), dim=-1)
        return vectors_SE

    def label_vectors(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Of prompts, each as long as the model's scale (exp of `logit_scale`), L×E, float32."""
        device = self.device
        found = self.get_text_features(input_ids=input_ids.to(device), attention_mask=attention_mask.to(device))
        vectors_LE: Tensor = normalize(found.pooler_output.float(), dim=-1) * self.logit_scale.float().exp()
        return vectors_LE


def contrastive_loss(logits_SL: Tensor, labels_S: Tensor) -> Tensor:
    """Mean of both directions: of each picture the right label among all of the task, and of each picture's label the
    right pictures among those of the micro-batch, which share the target evenly where they have the same label.

    Source:
        The symmetric loss is CLIP's (arXiv:2103.00020); pictures to all labels of the task, as CoDyRA
        (arXiv:2412.01004) trains; shared targets as in UniCL (arXiv:2204.03610).
    """
    same_SS = (labels_S[:, None] == labels_S).float()
    of_labels = cross_entropy(logits_SL.T[labels_S], same_SS / same_SS.sum(dim=1, keepdim=True))
    return (cross_entropy(logits_SL, labels_S) + of_labels) / 2


def prompt_tokens(tokenizer: Any, spec: TaskSpec, length_max: int) -> dict[str, Tensor]:
    """Token ids and mask of each label's prompt, L×T. Raises as `tokens.check_prompts`."""
    check_prompts(tokenizer, spec, length_max)
    return dict(tokenizer(prompts_of(spec), padding=True, padding_side="right", return_tensors="pt"))
