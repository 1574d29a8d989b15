"""Newline rows of tiled images (LLaVA-NeXT, LLaVA-OneVision), which are not scored and always kept."""

from torch import Tensor
from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape

from mipruner_vllm.model import Pruned
from mipruner_vllm.processor import Questions


class NewlineQuestions(Questions):
    marker = "image_token_index"

    def n_fixed(self, items, k: int) -> int:
        size = items.get_image_size(k)
        config, encoder = self.info.get_hf_config(), self.info.get_vision_encoder_info()
        image_size = (size.height, size.width)
        rows, columns = get_anyres_image_grid_shape(image_size, config.image_grid_pinpoints, encoder.get_image_size())
        _, n_newlines = self.info._get_num_unpadded_features(
            original_height=size.height,
            original_width=size.width,
            npatches=encoder.get_patch_grid_length(),
            num_patch_height=rows,
            num_patch_width=columns,
        )
        return n_newlines


class Newlines(Pruned):
    def is_candidate(self, rows: Tensor) -> Tensor:
        return (rows != self.image_newline).any(-1)
