"""What transformers does to logits, for options of ours."""

import torch
from transformers.generation.logits_process import (
    ForcedBOSTokenLogitsProcessor,
    ForcedEOSTokenLogitsProcessor,
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SuppressTokensAtBeginLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

EOS, LENGTH = 3, 24  # the end of text, and the length at which texts end


def warpers_of(options, prompt_length, limit):
    """What transformers' generate() does, in its order; temperature 0 is do_sample=False."""
    found = LogitsProcessorList()
    if options.repetition_penalty != 1:
        found.append(RepetitionPenaltyLogitsProcessor(options.repetition_penalty))
    if options.no_repeat_ngram_size:
        found.append(NoRepeatNGramLogitsProcessor(options.no_repeat_ngram_size))
    if options.bad_words_ids and {*options.bad_words_ids} != {(EOS,)}:
        found.append(NoBadWordsLogitsProcessor([*map(list, options.bad_words_ids)], EOS))
    if options.min_new_tokens:
        found.append(MinNewTokensLengthLogitsProcessor(prompt_length, options.min_new_tokens, EOS))
    if options.forced_bos_token_id >= 0:
        found.append(ForcedBOSTokenLogitsProcessor(options.forced_bos_token_id))
    if options.forced_eos_token_id >= 0:
        found.append(ForcedEOSTokenLogitsProcessor(limit, options.forced_eos_token_id))
    if options.suppress_tokens:
        found.append(SuppressTokensLogitsProcessor([*options.suppress_tokens]))
    if options.begin_suppress_tokens:
        begin = prompt_length + (prompt_length == 1 and options.forced_bos_token_id >= 0)
        found.append(SuppressTokensAtBeginLogitsProcessor([*options.begin_suppress_tokens], begin))
    if not options.temperature:
        return found
    found.append(TemperatureLogitsWarper(options.temperature))
    if options.top_k:
        found.append(TopKLogitsWarper(options.top_k))
    if options.top_p < 1:
        found.append(TopPLogitsWarper(options.top_p))
    if options.min_p:
        found.append(MinPLogitsWarper(options.min_p))
    return found


def warped(logits, options, text=(0,), prompt_length=1, limit=LENGTH):
    """Logits of one row as transformers' generate() warps them; -inf where it drops a token."""
    ids = torch.tensor([list(text)])
    return warpers_of(options, prompt_length, limit)(ids, torch.from_numpy(logits[None]))[0].numpy()
