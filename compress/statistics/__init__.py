"""Second moments of activations, and the inputs they are taken on."""
