"""How text is split before byte-level BPE, by the names that GGUF files give to it (`tokenizer.ggml.pre`)."""

from dataclasses import dataclass

from llama.tokenizer.tiktoken_vocab import PATTERN


@dataclass(frozen=True)
class PreRule:
    """How text is prepared for BPE.

    splits: patterns that are applied in turn; each match, and each text between two, is then encoded by itself.
    ignore_merges: whether a split that is a token as a whole becomes that token, whatever the merges say.
    add_bos: whether a prompt begins with BOS where the file does not say.
    """

    splits: tuple[str, ...]
    ignore_merges: bool = False
    add_bos: bool = False


CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
QWEN2 = PATTERN.replace(r"\p{N}{1,3}", r"\p{N}")
QWEN35 = QWEN2.replace(r"?\p{L}+", r"?[\p{L}\p{M}]+").replace(r"[^\s\p{L}\p{N}]", r"[^\s\p{L}\p{M}\p{N}]")
SEED = QWEN2.replace(r" ?[^\s\p{L}\p{N}]+[\r\n]*", r" ?[^\s\p{L}\p{N}\r\n]+")
JAIS2 = PATTERN.replace(
    r"\s+(?!\S)|\s+", "".join(rf"\s{{{2**n}}}(?!\S)|" for n in range(9, 1, -1)) + r"\s{1,2}(?!\S)|\s"
)
LING = r"'(?i:[sdmt]|ll|ve|re)|" + QWEN2.removeprefix(CONTRACTION + "|").replace(r"\s*[\r\n]+", r"\s*[\r\n]")
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+%s|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*%s|"
SYMBOLS = rf" ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{SPACES}"
TEKKEN = CASED.replace("%s", "") + r"\p{N}|" + SYMBOLS
GPT4O = CASED.replace("%s", CONTRACTION + "?") + r"\p{N}{1,3}|" + SYMBOLS
VIKING = " ?[^(\\s|.,!?…。，、।۔،)]+"
CJK = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
PUNCTUATION, THREE_DIGITS = r"[\p{P}$+<=>^~|%s]+", "[0-9][0-9][0-9]"
DEEPSEEK_V3 = (
    r"\p{N}{1,3}",
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    r"[!-/:-@\[-`{-~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|" + SPACES,
)
DEEPSEEK_LETTERS = (  # cased ones, as the file of DeepSeek LLM lists them
    "A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅ"
    "ὐ-ὗὙὛὝὟ-ώᾀ-ᾴᾶ-ᾼιῂ-ῄῆ-ῌῐ-ΐῖ-Ίῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤΩℨK-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-"
    "ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃"
)
DEEPSEEK_PUNCTUATION = r"\s?[!-/:-~" + "\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+"

# Names and rules are those of llama.cpp's llama-vocab.cpp, patterns those of the models' own tokenizer.json. "default"
# is what a converter wrote that did not know the model.
RULES = (
    (
        ("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"),
        PreRule((PATTERN,), ignore_merges=True, add_bos=True),
    ),
    (("smaug-bpe", "dbrx", "chatglm-bpe"), PreRule((PATTERN,))),
    (("glm4", "glm5"), PreRule((PATTERN,), ignore_merges=True)),
    (("minicpm5",), PreRule((r"\p{N}{1,3}", PATTERN.replace("{1,3}", "+")), ignore_merges=True)),
    (("jais-2",), PreRule((JAIS2,))),
    (
        ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b", "mellum2"),
        PreRule((r"\p{N}", GPT2)),
    ),
    (
        ("gpt-2", "phi-2", "mpt", "olmo", "jais", "gigachat", "a.x-4.0", "mellum", "exaone4", "trillion")
        + ("granite-docling", "modern-bert"),
        PreRule((GPT2,)),
    ),
    (
        ("qwen2", "deepseek-r1-qwen", "stablelm2", "megrez", "hunyuan", "kormo", "f2llmv2", "grok-2", "solar-open"),
        PreRule((QWEN2,)),
    ),
    (("qwen35",), PreRule((QWEN35,))),
    (("ufakzeka",), PreRule((QWEN2.removeprefix(CONTRACTION + "|"),))),
    (("laguna",), PreRule((r"[^\n]+|[\n]+", QWEN2))),
    (("bailingmoe", "bailingmoe2", "llada-moe"), PreRule((LING,))),
    (("tekken",), PreRule((TEKKEN,), ignore_merges=True, add_bos=True)),
    (("gpt-4o", "llama4", "kanana2", "talkie", "minimax-m2"), PreRule((GPT4O,))),
    (("seed-coder",), PreRule((SEED,))),
    (("viking",), PreRule((VIKING, r"\p{N}"))),
    (("poro-chat", "bloom", "gpt3-finnish"), PreRule((VIKING,))),
    (("superbpe",), PreRule((r"\p{N}+", r"(?=(\d{3})+(?!\d))"))),
    (("deepseek-coder",), PreRule(("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", CJK, r"\p{N}"))),
    (
        ("deepseek-llm",),
        PreRule(("[\r\n]", rf"\s?[{DEEPSEEK_LETTERS}]+", DEEPSEEK_PUNCTUATION, r"\s+$", CJK, r"\p{N}+")),
    ),
    (("deepseek-v3", "hunyuan-dense", "joyai-llm", "hy_v4"), PreRule(DEEPSEEK_V3)),
    (("falcon",), PreRule((PUNCTUATION % "`", GPT2, THREE_DIGITS))),
    (("default",), PreRule((PUNCTUATION % "", GPT2, r"\p{N}+", THREE_DIGITS))),
)
PRE_RULES = {name: rule for names, rule in RULES for name in names}
