"""Name the files of an export and the packages that ONNX needs. Imports nothing, so that `--help` is quick."""

MANIFEST, FAILED = "manifest.json", "failed"
# All that an export of either format leaves: a manifest describes one export alone.
FILES = (
    MANIFEST,
    *(f"{part}{suffix}" for part in ("encoder", "decoder") for suffix in (".pt2", ".onnx", ".onnx.data")),
    FAILED,
)
ONNX = ("onnx", "onnxscript", "onnxruntime")
