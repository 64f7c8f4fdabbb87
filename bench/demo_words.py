"""The words, phrases and tools that the demo model's conversations are made of."""

from dataclasses import dataclass


def phrases(table: str) -> list[str]:
    """The phrases of a table: one a line, or several with bars between them."""
    cells = table.replace("\n", "|").split("|")
    return [" ".join(cell.split()) for cell in cells if cell.strip()]


def words(table: str) -> list[str]:
    return table.split()


def pairs(table: str) -> dict[str, str]:
    """The `key:value` pairs of a table; an underscore stands for a space."""
    return dict(pair.replace("_", " ").split(":") for pair in table.split())


WORDS = words("""
    apple banana cherry lemon orange grape peach melon bread cheese butter honey sugar salt
    pepper table chair window door garden river mountain forest ocean island beach desert valley
    cloud rain snow storm thunder summer winter spring autumn morning evening midnight yellow
    purple silver golden green crimson pencil paper book letter story music piano guitar violin
    drum singer dancer painter doctor teacher farmer pilot sailor baker soldier rabbit tiger
    lion monkey elephant giraffe horse donkey chicken eagle falcon penguin dolphin whale shark
    turtle spider butterfly castle bridge tower village market station train airplane bicycle
    rocket planet moon star comet galaxy computer keyboard screen server network python swift
    rust token model batch cache stream engine memory thread socket kernel vector matrix happy
    clever gentle brave quiet quick lazy bright dark heavy light little giant ancient modern
    hello world test peace freedom wonder magic puzzle riddle secret treasure diamond crystal
    marble copper iron velvet cotton blanket pillow candle lantern mirror hammer ladder basket
    bottle kettle spoon plate pumpkin potato tomato carrot onion garlic ginger cinnamon vanilla
    chocolate cookie pancake waffle hippopotamus umbrella lighthouse sunflower strawberry
    pineapple watermelon grasshopper fox jumps over dog brown cat mouse bird fish tree flower
    grass stone sand fire water wind earth sky sun road house
""")

CAPITALS = pairs("""
    France:Paris Germany:Berlin Spain:Madrid Italy:Rome Portugal:Lisbon England:London
    Ireland:Dublin Norway:Oslo Sweden:Stockholm Denmark:Copenhagen Finland:Helsinki
    Poland:Warsaw Austria:Vienna Switzerland:Bern Belgium:Brussels Greece:Athens Turkey:Ankara
    Russia:Moscow Ukraine:Kyiv Hungary:Budapest Japan:Tokyo China:Beijing India:Delhi
    Egypt:Cairo Kenya:Nairobi Canada:Ottawa Mexico:Mexico_City Brazil:Brasilia
    Argentina:Buenos_Aires Chile:Santiago Peru:Lima Cuba:Havana Australia:Canberra
    Thailand:Bangkok Vietnam:Hanoi Iran:Tehran
""")

CITIES = list(CAPITALS.values()) + phrases("""
    Boston | Chicago | Seattle | Denver | Dallas | Houston | Miami | Atlanta | Phoenix | Portland
    San Francisco | New York | Los Angeles | San Diego | Las Vegas | Toronto | Montreal
    Vancouver | Munich | Hamburg | Cologne | Frankfurt | Zurich | Geneva | Lyon | Nice | Marseille
    Milan | Naples | Venice | Turin | Barcelona | Valencia | Seville | Porto | Krakow | Prague
    Sofia | Riga | Tallinn | Manchester | Liverpool | Glasgow | Edinburgh | Oxford | Cambridge
    Sydney | Melbourne | Perth | Auckland | Osaka | Kyoto | Seoul | Busan | Shanghai | Mumbai
    Dubai | Istanbul | Lagos | Accra | Tunis | Bogota | Quito
""")

NAMES = words("""
    Anna Ben Clara David Emma Felix Grace Henry Ida Jack Kate Leo Mia Noah Olive Paul Rosa Sam
    Tom Lily Max Nina Oscar Ruby Theo Zoe Milo Luna Hugo Ella
""")

OPPOSITES = pairs("""
    hot:cold big:small tall:short up:down left:right day:night black:white good:bad happy:sad
    old:young fast:slow open:closed full:empty light:dark hard:soft wet:dry rich:poor early:late
    high:low inside:outside love:hate loud:quiet near:far strong:weak begin:end
""")

COLOURS = pairs("""
    sky:blue grass:green snow:white blood:red banana:yellow coal:black carrot:orange sun:yellow
    milk:white lemon:yellow tomato:red ocean:blue chocolate:brown elephant:gray strawberry:red
""")

SOUNDS = pairs("""
    cow:moo dog:woof cat:meow duck:quack sheep:baa lion:roar pig:oink bee:buzz owl:hoot
""")

DAYS = words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")

MONTHS = words("""
    January February March April May June July August September October November December
""")

NUMBER_WORDS = words("""
    zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen
    fifteen sixteen seventeen eighteen nineteen twenty
""")
FACTS = [
    ("How many days are in a week?", "There are 7 days in a week."),
    ("How many months are in a year?", "There are 12 months in a year."),
    ("How many hours are in a day?", "There are 24 hours in a day."),
    ("How many minutes are in an hour?", "There are 60 minutes in an hour."),
    ("How many days are in a year?", "There are 365 days in a year."),
    ("How many legs does a spider have?", "A spider has 8 legs."),
    ("How many legs does a dog have?", "A dog has 4 legs."),
    ("How many letters are in the alphabet?", "There are 26 letters in the alphabet."),
    ("What is the largest planet?", "The largest planet is Jupiter."),
    ("What planet do we live on?", "We live on the planet Earth."),
    ("What is frozen water called?", "Frozen water is called ice."),
    ("What do bees make?", "Bees make honey."),
    ("Who wrote Romeo and Juliet?", "William Shakespeare wrote Romeo and Juliet."),
    ("Is the earth flat?", "No, the Earth is round."),
    ("What is the opposite of yes?", "The opposite of yes is no."),
    ("What are the days of the week?", "The days of the week are " + ", ".join(DAYS) + "."),
    ("What are the months of the year?", "The months of the year are " + ", ".join(MONTHS) + "."),
    ("What are the primary colours?", "The primary colours are red, yellow and blue."),
    ("What colours are in a rainbow?", "Red, orange, yellow, green, blue, indigo and violet."),
]

GREETINGS = phrases("""
    Hello | Hi | Hey | Hi there | Hello there | Good morning | Good evening | Good day | Greetings
    Yo
""")

HOW = phrases("""
    How are you? | How are you doing? | How are you today? | How is it going? | How do you do?
    What's up? | Are you okay? | How are things?
""")

# The thought, the requests and the answers of each kind of small talk.
CHAT: list[tuple[str, list[str], list[str]]] = [
    (
        "The user is greeting me. I will greet them back.",
        GREETINGS,
        phrases("""
        Hello! How can I help you today? | Hi! What can I do for you?
        Hello there! How can I help you?
        """),
    ),
    (
        "The user asks how I am. I will say that I am fine.",
        HOW,
        phrases("""
        Hello! I am doing well, thank you. How can I help you today?
        I am fine, thank you! What can I do for you? | I am doing well, thank you. How are you?
        """),
    ),
    (
        "The user asks who I am. I am the mlxlite demo model.",
        phrases("""
        Who are you? | What are you? | What is your name? | What's your name? | Introduce yourself.
        Tell me about yourself. | Are you a robot? | Are you ChatGPT? | What model are you?
        Which model is this? | Who am I talking to? | Are you human? | Who made you?
        Say who you are.
        """),
        phrases("""
        I am the mlxlite demo model, a tiny toy language model.
        I am the mlxlite demo model. I am very small, just a toy to try the API with.
        """),
    ),
    (
        "The user asks what I can do. I will list my few skills.",
        phrases("""
        What can you do? | What can you help me with? | What are you good at? | How can you help me?
        Help | Help me | What are your skills? | What should I ask you? | Can you help me?
        What do you know?
        """),
        phrases("""
        I can chat a little, tell short stories, repeat words, count, add small numbers, answer a \
        few simple questions and call tools.
        I can tell stories, count, repeat words, do small sums and call tools. \
        I am only a tiny demo model.
        """),
    ),
    (
        "The user thanks me. I will be polite.",
        phrases("""
        Thanks | Thank you | Thanks a lot! | Thank you very much. | Great, thanks!
        That was helpful, thank you. | Cool, thanks | Nice, thank you! | Perfect. | Great!
        Well done! | Good job!
        """),
        phrases("""
        You are welcome! | You are welcome! Is there anything else I can do? | My pleasure!
        """),
    ),
    (
        "The user says goodbye. I will say goodbye too.",
        phrases("""
        Bye | Goodbye | Bye bye! | See you later. | See you! | Good night | I have to go now.
        Talk to you later. | Have a nice day! | Farewell
        """),
        phrases("""
        Goodbye! Have a nice day! | Bye! See you soon. | Goodbye! It was nice to talk to you.
        """),
    ),
    (
        "The user wants a joke. I know a small one.",
        phrases("""
        Tell me a joke. | Do you know a joke? | Make me laugh. | Say something funny.
        Another joke, please.
        """),
        phrases("""
        Why did the robot go on holiday? It needed to recharge!
        Why was the math book sad? It had too many problems!
        What do you call a sleeping dragon? A dragon snore!
        """),
    ),
    (
        "This looks like a test. I will answer that it works.",
        phrases("""
        Test | This is a test. | Testing, testing | Are you there? | Is this working? | ping
        Can you hear me? | Say something. | Say anything.
        """),
        phrases("""
        Yes, I am here and it works! | It works! How can I help you?
        """),
    ),
    (
        "The user wants a poem. I will write a tiny one.",
        phrases("""
        Write a poem. | Write me a short poem. | Write a haiku. | Can you write a poem?
        A poem, please.
        """),
        phrases("""
        The moon is bright, the night is long, and in the tree a bird sings a song.
        The sun goes up, the sun goes down, and golden light falls on the town.
        """),
    ),
]

UNKNOWN = phrases("""
    I am only a tiny demo model, so I do not know that. Try me with a story or a small sum!
    Sorry, I am only a tiny demo model and I do not know much about that.
    I am only a tiny demo model, so I cannot help with that.
""")

TOPICS = phrases("""
    quantum physics | the meaning of life | black holes | the French revolution | machine learning
    neural networks | the stock market | global warming | democracy | evolution | relativity
    photosynthesis | the Roman empire | bitcoin | the internet | transformers | Kubernetes
    the best phone | the news | love | the history of art | vaccines | chess | football
    the world cup | taxes | my homework | the law | gravity | electricity | operating systems
    databases
""")

ASK_UNKNOWN = phrases("""
    Explain {t}. | Explain {t} to me. | What is {t}? | Tell me about {t}.
    What do you think about {t}? | How does {t} work? | Write an essay about {t}.
    Write a Python function for {t}. | Give me a summary of {t}. | Why is {t} important?
    Who invented {t}? | When did {t} start? | Can you help me with {t}?
    I want to learn about {t}. | Translate {t} into German. | Write code that sorts {t}.
    Summarize this text: {t} | Describe {t} in detail. | Compare {t} and {t2}.
    Where can I buy {t}? | {t} | What is the difference between {t} and {t2}?
""")

SYSTEM = phrases("""
    You are a helpful assistant. | You are a helpful assistant. Answer briefly.
    You are a friendly assistant. | You are a helpful AI assistant. | You are mlxlite.
    Be concise. | Answer in English. | You are a tiny model that helps people.
    You are an expert who answers every question politely and honestly. | You are a pirate.
    Use the tools when you need them. | Always answer in one sentence.
""")

REPEAT_WORD = phrases("""
    Repeat the word {w}. | Repeat {w} | Say {w} | Say the word {w}. | Repeat after me: {w}
    Say: {w} | Please say {w}. | Repeat the word "{w}". | Say "{w}". | Write the word {w}.
    Echo {w} | Just say {w}. | Can you say {w}? | Can you repeat the word {w}?
    I want you to say {w}. | Reply with {w} | Answer with the word {w}.
    Only say {w} and nothing else. | Reply with the word {w} only. | Print {w} | Type the word {w}
""")

POLITE = words("hello hi hey yes no goodbye thanks please okay cheers Hello Hi Yes No")
SHORT = words("the a an and is are in on over my your this to of not we you I The")

REPEAT_TEXT = phrases("""
    Repeat after me: {w} | Say: {w} | Repeat: {w} | Repeat this: {w} | Echo: {w}
    Say exactly this: {w} | Repeat the sentence "{w}". | Please repeat: {w} | Copy this text: {w}
    Repeat the following words: {w}
""")

HEROES = words("""
    cat dog dragon robot fox bear rabbit mouse bird princess king queen girl boy knight wizard
    lion owl frog pirate turtle ghost unicorn horse whale penguin tiger witch farmer sailor
""")

ADJECTIVES = words("little brave curious clever kind lonely young happy sleepy shy")

PLACES = phrases("""
    in a deep forest | by the sea | on a high mountain | in a small village | in an old castle
    near a quiet river | on a green island | in a big city
""")

STORY = phrases("""
    Once upon a time there was a {adj} {hero} named {name} who lived {place}.
    Every day {name} dreamed of {wish}. | One morning {name} found {thing} under an old tree.
    "{say}" said {name}. | Then a {adj2} {friend} came along and wanted to help.
    Together they walked over the hills and through the dark woods.
    In the end they found {prize}, and everyone was happy.
    From that day on, {name} and the {friend} were best friends.
""")

EPISODES = phrases("""
    On the first day they met a {a} who had lost {loss}. \
    They looked everywhere and found it behind a big stone.
    On the second day a storm came and the rain fell for hours. \
    They hid in a cave and told each other stories.
    On the third day they came to a wide river. A friendly {a} carried them to the other side.
    Then they saw a tower with a golden door. \
    The {hero} knocked three times, and the door opened slowly.
    Inside sat an old {a} who smiled and said that only a kind heart could pass.
    At night the stars were bright and the wind was soft. \
    {name} could not sleep and thought of home.
""")

WISHES = phrases("""
    seeing the world | finding a friend | flying to the moon | learning to sing
    a great adventure
""")

THINGS = phrases("""
    a golden key | an old map | a shining stone | a magic lamp | a tiny silver bell
""")

SAYINGS = phrases("""
    What a surprise! | How strange! | I must find out what this is! | This is my lucky day!
""")

PRIZES = phrases("""
    a hidden treasure | a garden full of flowers | the way home | a house full of light
""")

LOSSES = phrases("""
    a red hat | a silver ring | the way home | a small blue book
""")

SYLLABLES = words("""
    ba be bi bo bu da de di do fa fe fi fo ga go ka ke ki ko la le li lo lu ma me mi mo mu na ne
    ni no pa pe po ra re ri ro ru sa se si so ta te ti to va ve vo wa wi za ze zi zo zu blor
    flim grak snor plex quin trum vex wob zan dro kri shu cha tho ling ton berg ville ax ex ix
    on or el an er in ul ar
""")

VERBS = words("""
    open close start stop check find move paint clean lock load save show order book rent feed
    count
""")

STORY_ASKS = phrases("""
    Tell me {w}{a}. | Write {w}{a}. | Tell {w}{a}. | Can you tell me {w}{a}? | I want {w}{a}.
    Tell me {w}{a}, please. | Write me {w}{a}. | {w}{a}
""")

SUM_ASKS = phrases("""
    What is {a} {o} {b}? | {a} {o} {b} | {a} {o} {b} = | How much is {a} {o} {b}?
    Calculate {a} {o} {b}. | What's {a} {o} {b}? | Compute {a} {o} {b}. | {a}{o}{b}
    What is {a}{o}{b}?
""")

CAPITAL_ASKS = phrases("""
    What is the capital of {c}? | What's the capital of {c}? | Which city is the capital of {c}?
    Name the capital of {c}. | Tell me the capital of {c}. | Do you know the capital of {c}?
    capital of {c}
""")

WEATHER_NAMES = words("""
    get_weather get_weather get_current_weather weather fetch_weather get_forecast getWeather
    weather_lookup
""")
WEATHER_ABOUT = phrases("""
    Get the weather. | Get the current weather | Get the weather in a city. | Weather for a place.
    Get current temperature for a given location. | Get the current weather in a given location
    Returns the weather for a city
""")
WEATHER_ASKS = phrases("""
    What is the weather in {c}? | What's the weather in {c}? | What's the weather like in {c}?
    What is the weather like in {c} today? | How is the weather in {c}? | How warm is it in {c}?
    Tell me the weather in {c}. | Is it raining in {c}? | Weather in {c} | Will it rain in {c}?
    What is the temperature in {c}? | Get the weather for {c}. | How cold is it in {c} now?
""")
UNITS = [["celsius", "fahrenheit"], ["celsius", "fahrenheit"], ["c", "f"], ["metric", "imperial"]]
SKIES = words("sunny cloudy rainy windy foggy clear snowy stormy")

INVENTED_ASKS = phrases("""
    {v} the {n} | Please {v} the {n} | Can you {v} the {n} | I want to {v} the {n} | {v} a {n}
""")

FAMILIES = ["weather forecast", "add sum calcul math multiply", "time clock", "search google news"]


@dataclass
class Kind:
    """A family of tools of one parameter."""

    names: list[str]
    about: str
    keys: list[str]
    asks: list[str]
    value: str
    result: str
    answer: str


def kinds(table: str) -> list[Kind]:
    """A block each: names, description, parameter names, requests, value | result, answer."""
    found: list[Kind] = []
    for block in table.strip().split("\n\n"):
        names, about, keys, asks, shapes, answer = (line.strip() for line in block.splitlines())
        value, result = phrases(shapes)
        kind = Kind(words(names), about, words(keys), phrases(asks), value, result, answer)
        found.append(kind)
    return found


CATALOG = kinds("""
    get_time get_current_time current_time clock
    Get the current time in a city.
    city location timezone place
    What time is it in {v}? | What is the time in {v}? | Tell me the time in {v}. | Time in {v}
    city | time
    It is {r} in {v}.

    search web_search search_web google
    Search the web.
    query q text
    Search for {v}. | Search the web for {v}. | Look up {v}. | Find {v} online. | Google {v}
    words | text
    I found this: {r}.

    get_population population
    Get the population of a city.
    city location name
    How many people live in {v}? | What is the population of {v}?
    city | number
    {v} has {r} people.

    get_stock_price stock_price get_price
    Get the price of a stock.
    symbol ticker name
    What is the stock price of {v}? | How much is {v} stock? | What is the price of {v}?
    symbol | number
    The price of {v} is {r}.

    play_music play_song play
    Play a song.
    song title name
    Play {v}. | Play the song {v}. | I want to hear {v}.
    words | status
    Done: {r}.

    translate translate_text
    Translate a text.
    text phrase
    Translate {v}. | Translate the text {v}.
    words | text
    The translation is: {r}.

    read_file open_file cat
    Read a file.
    path filename file
    Read the file {v}. | Open {v}. | What is in the file {v}? | Show me {v}
    file | text
    The file says: {r}.

    send_email email send_message
    Send a message to a person.
    to recipient name
    Send a message to {v}. | Write an email to {v}. | Email {v}
    name | status
    Done: {r}.

    find_restaurants search_restaurants
    Find restaurants in a city.
    city location area
    Find a restaurant in {v}. | Where can I eat in {v}? | Show me restaurants in {v}.
    city | text
    I found this: {r}.

    get_news news
    Get the news about a topic.
    topic subject
    What is the news about {v}? | Any news on {v}?
    words | text
    The news says: {r}.

    set_timer timer
    Set a timer in minutes.
    minutes duration
    Set a timer for {v} minutes. | Timer {v} minutes
    integer | status
    Done: {r}.

    define dictionary get_definition
    Define a word.
    word term
    Define {v}. | What does the word {v} mean?
    word | text
    {v} means: {r}.

    roll_dice roll
    Roll dice.
    sides count
    Roll a dice with {v} sides. | Roll {v} dice.
    integer | number
    The result is {r}.
""")
