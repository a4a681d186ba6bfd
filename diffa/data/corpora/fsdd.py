"""Facts about the Free Spoken Digit Dataset: its words, speakers and official split."""

DIGIT_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TEST_INDICES = range(5)  # the official split: 0-4 test, 5-49 training
ACCENTS = {
    "george": "greek",
    "jackson": "american",
    "lucas": "german",
    "nicolas": "french",
    "theo": "american",
    "yweweler": "german",
}
