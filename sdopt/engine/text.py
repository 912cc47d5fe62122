"""A text encoder's calls by CUDA graphs: some hundred small kernels, which take longer to launch than to run."""

from transformers import CLIPTextModel, CLIPTextModelWithProjection

from sdopt.engine import graphs

KINDS = (CLIPTextModel, CLIPTextModelWithProjection)
KNOWN = ("output_hidden_states", "return_dict")


class TextEncoder(graphs.Captured):
    """The model's `forward` of token ids, to the same result; any other call is left to transformers."""

    def __call__(self, input_ids=None, **kwargs):
        if self.look() and self.reason is None and input_ids is not None:
            self.reason = graphs.waits(lambda: type(self.module).forward(self.module, input_ids))
        asked = {name: value for name, value in kwargs.items() if value is not None}
        unknown = [name for name in asked if name not in KNOWN]
        reason = self.obstacle()
        if unknown or input_ids is None:
            reason = f"it was called with {', '.join(unknown) or 'no tokens'}"
        if reason:
            return self.eagerly(reason, input_ids, **kwargs)
        return self.of_one(input_ids, **asked)
