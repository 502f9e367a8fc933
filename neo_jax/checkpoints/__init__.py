"""Models in files: Hugging Face's, Flax's, Mesh-TensorFlow's and PEFT's, read and written."""
