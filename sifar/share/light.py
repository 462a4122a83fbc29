"""The model of a .onnx file, computed by ONNX Runtime: without torch and fastai."""
import numpy as np
from PIL import Image

from ..data.image import check_facts
from ..errors import UserError, need, one_line
from ..files import read_about


class OnnxModel:
    """The model in a .onnx file that export.py wrote, as LearnerModel has it; it lies beside its model.json.

    Errors: UserError."""

    def __init__(self, path):
        try:
            import onnxruntime
        except ImportError as e:
            raise UserError(f"{path} needs ONNX Runtime: pip install onnxruntime") from e
        need(path.is_file(), f"{path} is missing: make it with python export.py RUN --onnx.")
        self.about = read_about(path)
        try:
            check_facts(self.about)
            self.vocab, self.sz = self.about["classes"], self.about["size"]
            self.superclasses, self.fit = self.about.get("superclasses"), self.about.get("fit", "halfway")
            options = onnxruntime.SessionOptions()
            # else its threads keep the processors busy for some time after each picture
            options.add_session_config_entry("session.intra_op.allow_spinning", "0")
            cpu = ["CPUExecutionProvider"]
            self.session = onnxruntime.InferenceSession(path, options, providers=cpu)
            self.maps = len(self.session.get_outputs()) > 1
            shape = self.probs(np.zeros((1, self.sz, self.sz, 3), np.uint8)).shape
            need(shape == (1, len(self.vocab)), "it has other classes than its model.json")
        # ONNX Runtime has errors of its own for each thing that is wrong with a file
        except Exception as e:
            raise UserError(f"{path} and the model.json beside it are no model: {one_line(e, 200)}.") from e

    def probs(self, images):
        "The probabilities (n,c) of images (n,sz,sz,3) uint8, both as arrays."
        return self.session.run(["probabilities"], {"images": images})[0]

    def heat_map(self, image, c):
        "As that of LearnerModel, from what the model says of each class and place; None where it does not."
        if not self.maps: return None
        grid = self.session.run(["maps"], {"images": image[None]})[0][0, c].clip(0)         # (h,w)
        grid = Image.fromarray(grid / grid.max().clip(1e-12))
        return np.asarray(grid.resize((self.sz, self.sz), Image.Resampling.BILINEAR))
