"""What users call: texts in, texts, scores and features out."""
