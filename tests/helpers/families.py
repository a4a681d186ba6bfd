"""Tiny configurations of every family of pretrained encoders, for tests."""

SPEECH = {
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 20,
    "conv_dim": [8] * 7,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
}
BODY = {
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 20,
}
LAYERED = {"feat_extract_norm": "layer", "do_stable_layer_norm": True, "conv_bias": True}
TOWER = {
    "d_model": 16,
    "encoder_layers": 3,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 20,
    "num_mel_bins": 32,
    "max_source_positions": 50,
}

CONFIGS = {
    "wav2vec2": dict(model_type="wav2vec2", **SPEECH),
    "wav2vec2-large": dict(model_type="wav2vec2", **SPEECH, **LAYERED),
    "hubert": dict(model_type="hubert", **SPEECH),
    "hubert-large": dict(model_type="hubert", **SPEECH, **LAYERED),
    "wavlm": dict(model_type="wavlm", **SPEECH),
    "wavlm-large": dict(model_type="wavlm", **SPEECH, **LAYERED),
    "data2vec": dict(model_type="data2vec-audio", **SPEECH),
    "wav2vec2-bert": dict(model_type="wav2vec2-bert", **BODY),
    "ast": dict(model_type="audio-spectrogram-transformer", **BODY, max_length=64, num_mel_bins=32),
    "clap": {
        "model_type": "clap_audio_model",
        "patch_embeds_hidden_size": 8,
        "depths": [1, 1, 1, 2],
        "num_attention_heads": [1, 1, 2, 4],
        "hidden_size": 64,
    },
    "clap-fused": {
        "model_type": "clap_audio_model",
        "patch_embeds_hidden_size": 8,
        "depths": [1, 1, 1, 2],
        "num_attention_heads": [1, 1, 2, 4],
        "hidden_size": 64,
        "enable_fusion": True,
        "fusion_type": "aff_2d",
    },
    "parakeet": dict(model_type="parakeet_encoder", **BODY, subsampling_conv_channels=8),
    "qwen2-audio": dict(model_type="qwen2_audio_encoder", **TOWER),
    "audio-flamingo": dict(model_type="audioflamingo3_encoder", **TOWER),
    "qwen-omni": dict(model_type="qwen2_5_omni_audio_encoder", **TOWER, n_window=10, output_dim=24),
}
