"""The reference network in Keras 3 on TensorFlow, run by an interpreter that has them: no torch, no fastnn.

    python keras_epochs.py IMAGES.npz BATCH THREADS

Prints its versions as JSON, then trains one epoch per line on stdin and answers with its seconds.
"""

import json
import os
import sys
import time

os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")


def main() -> None:
    path, batch, threads = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    import keras
    import numpy as np
    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(threads)
    with np.load(path) as arrays:
        images = arrays["images"].transpose(0, 2, 3, 1).astype("float32") / 255
        labels = arrays["labels"].astype("int32")

    keras.utils.set_random_seed(0)
    layers = keras.layers
    model = keras.Sequential(
        [
            keras.Input(images.shape[1:]),
            layers.Conv2D(32, 3, activation="relu"),
            layers.MaxPooling2D(2),
            layers.Conv2D(64, 3, activation="relu"),
            layers.MaxPooling2D(2),
            layers.Flatten(),
            layers.Dense(64, activation="relu"),
            layers.Dense(10),
        ]
    )
    model.compile(
        optimizer=keras.optimizers.Adam(1e-3),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    model.fit(images[: 4 * batch], labels[: 4 * batch], batch_size=batch, verbose=0)  # traces and compiles
    print(json.dumps({"keras": keras.__version__, "tensorflow": tf.__version__}), flush=True)
    for _ in sys.stdin:
        began = time.perf_counter()
        model.fit(images, labels, batch_size=batch, verbose=0)
        print(time.perf_counter() - began, flush=True)


main()
