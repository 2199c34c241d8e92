"""From graph modules in torch to a `.tflite` graph without matrices."""
