"""Name the files of an export and the packages that ONNX needs. Imports nothing, so that `--help` is quick."""

MANIFEST, FAILED = "manifest.json", "failed"
# All files of an export in either format, since a manifest describes one export only.
FILES = (
    MANIFEST,
    *(f"{part}{suffix}" for part in ("encoder", "decoder") for suffix in (".pt2", ".onnx", ".onnx.data")),
    FAILED,
)
ONNX = ("onnx", "onnxscript", "onnxruntime")
