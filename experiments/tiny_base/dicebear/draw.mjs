// Draws cartoon avatars with DiceBear, with options chosen here, so that what each avatar shows is known.
//
//     npm install && node draw.mjs OUT.jsonl SEED SCALE [STYLE...]
//
// Writes one JSON object a line, in random order: {"style", "attributes", "svg"}. Attributes bear the names of
// DiceBear's options (https://www.dicebear.com/styles); colours are names. SCALE 1 gives 40,000 avatars. Everything
// follows from SEED. Left out are options that characters cannot wear, that captions have no word for, or that look
// like something else than they are.
//
// The drawings: Personas by Draftbit, Custom Avatar by Ashley Seo, Avatar Illustration System by Micah Lanier, ToonHead
// by Johan Melin, Miniavs by Webpixels, Dylan by Natalia Spivak and Fun Emoji Set by Davis Uche (all CC BY 4.0);
// Avataaars by Pablo Stanley (free for personal and commercial use).

import fs from 'node:fs';
import { createAvatar } from '@dicebear/core';
import { avataaars, bigSmile, dylan, funEmoji, miniavs, micah, personas, toonHead } from '@dicebear/collection';

// The colours of palette.py.
const HAIRS = {
  black: '#2b2430', brown: '#6b4226', blond: '#efc75e', red: '#c23b2e', ginger: '#e2803c', gray: '#a9a9b2',
  white: '#f3f3f3', blue: '#3f6fd8', pink: '#f08bb5', green: '#3fa36b', purple: '#7d4fc4',
};
const SKINS = { light: '#f9d3b8', tan: '#dfa476', brown: '#a9683f', dark: '#6b4028' };
const COATS = {
  red: '#d94343', blue: '#3d6fd6', green: '#49a85a', yellow: '#f2c53d', orange: '#ef8636', purple: '#8050c8',
  pink: '#f285b5', white: '#f7f7f5', black: '#2d2d35', teal: '#2fa8a0', brown: '#8a5a36', gray: '#a3a3ab',
};
const { black, ...EMOJI_COLOURS } = COATS; // the features are black

// For each style: `count`, avatars at SCALE 1; `choices`, one value of each is drawn (repeated ones more often);
// `sometimes`, [probability, values]; `colours`, options that take a colour; `settle` changes attributes that do not go
// together; `retouch` changes the SVG.
const STYLES = {
  personas: {
    draw: personas,
    count: 9000,
    choices: {
      hair: [
        'long', 'extraLong', 'shortCombover', 'shortComboverChops', 'fade', 'curlyHighTop', 'curly', 'bobCut',
        'bobBangs', 'curlyBun', 'straightBun', 'bald', 'cap', 'cap', 'beanie', 'beanie',
      ],
      eyes: ['open', 'open', 'sleep', 'wink', 'wink', 'glasses', 'glasses', 'happy', 'sunglasses'],
      mouth: ['smile', 'frown', 'surprise', 'bigSmile'],
      body: ['squared', 'rounded', 'checkered'],
      nose: ['mediumRound', 'smallRound'],
    },
    sometimes: { facialHair: [0.3, ['beardMustache', 'pyramid', 'walrus', 'goatee', 'shadow']] },
    colours: { hairColor: HAIRS, skinColor: SKINS, clothingColor: COATS, hatColor: COATS },
    retouch: retouchPersonas,
  },
  'big-smile': {
    draw: bigSmile,
    count: 7000,
    choices: {
      hair: [
        'shortHair', 'shavedHead', 'bowlCutHair', 'mohawk', 'wavyBob', 'straightHair', 'braids', 'bunHair', 'froBun',
        'bangs', 'curlyShortHair',
      ],
      eyes: ['normal', 'normal', 'starstruck', 'winking', 'winking', 'sleepy', 'sad', 'angry'],
      mouth: ['openedSmile', 'unimpressed', 'teethSmile', 'awkwardSmile', 'braces', 'kawaii'],
    },
    sometimes: { accessories: [0.45, ['glasses', 'sunglasses', 'mustache']] },
    colours: { hairColor: HAIRS, skinColor: SKINS },
    settle(attributes) {
      // The moustache would cover these mouths.
      const covered = ['unimpressed', 'kawaii'].includes(attributes.mouth);
      if (attributes.accessories === 'mustache' && covered) attributes.mouth = 'openedSmile';
    },
    // Without the blush, which is too faint to be called pink cheeks.
    retouch: (elements) => elements.replace(/<path [^>]*fill="#DC2400"[^>]*>/, ''),
  },
  micah: {
    draw: micah,
    count: 7000,
    choices: {
      hair: ['fonze', 'mrT', 'mrClean', 'dannyPhantom', 'full', 'full', 'pixie'],
      eyes: ['eyes', 'round', 'smiling'],
      eyebrows: ['up'],
      mouth: ['surprised', 'laughing', 'nervous', 'smile', 'smirk', 'frown', 'sad'],
      nose: ['curve', 'pointed', 'tound'],
      shirt: ['open', 'crew', 'collared'],
    },
    sometimes: {
      glasses: [0.4, ['round', 'square']],
      earrings: [0.2, ['hoop', 'stud']],
      facialHair: [0.3, ['beard', 'scruff']],
    },
    colours: { hairColor: HAIRS, baseColor: SKINS, shirtColor: COATS },
    fixed: { glassesColor: ['000000'], earringColor: ['f4d150'] },
  },
  'toon-head': {
    draw: toonHead,
    count: 7000,
    choices: {
      hair: ['sideComed', 'sideComed', 'sideComed', 'undercut', 'spiky', 'bun'],
      eyes: ['wide', 'wide', 'wide', 'bow', 'humble', 'wink', 'wink'],
      eyebrows: ['neutral', 'raised', 'happy', 'angry', 'sad'],
      mouth: ['laugh', 'laugh', 'angry', 'agape', 'sad'],
      clothes: ['turtleNeck', 'openJacket', 'shirt', 'tShirt'],
    },
    sometimes: {
      rearHair: [0.7, ['longStraight', 'longWavy', 'shoulderHigh', 'neckHigh']],
      beard: [0.3, ['moustacheTwirl', 'fullBeard', 'longBeard']],
    },
    colours: { hairColor: HAIRS, skinColor: SKINS, clothesColor: COATS },
    settle(attributes) {
      if (attributes.hair !== 'sideComed') attributes.rearHair = null;
      if (attributes.eyes !== 'wide') attributes.eyebrows = 'neutral';
    },
  },
  miniavs: {
    draw: miniavs,
    count: 4000,
    choices: {
      hair: ['ponyTail', 'ponyTail', 'ponyTail', 'long', 'curly', 'stylish', 'elvis', 'classic01', 'classic02'],
      eyes: ['normal', 'happy'],
      mouth: ['default', 'missingTooth'],
      head: ['normal', 'wide', 'thin'],
      body: ['tShirt', 'golf'],
    },
    sometimes: {
      glasses: [0.4, ['normal']],
      mustache: [0.35, ['pencilThin', 'horshoe', 'freddy']],
      blushes: [0.4, ['default']],
    },
    colours: { hairColor: HAIRS, skinColor: SKINS, bodyColor: COATS },
  },
  dylan: {
    draw: dylan,
    count: 3000,
    choices: {
      hair: ['plain', 'wavy', 'parting', 'flatTop', 'shortCurls', 'longCurls', 'spiky', 'spiky', 'roundBob', 'bangs'],
      mood: ['happy', 'angry', 'neutral', 'superHappy', 'sad'],
    },
    sometimes: { facialHair: [0.2, ['default']] },
    colours: { hairColor: HAIRS, skinColor: SKINS },
  },
  'fun-emoji': {
    draw: funEmoji,
    count: 3000,
    choices: {
      eyes: [
        'plain', 'cute', 'sad', 'pissed', 'wink', 'wink2', 'closed', 'closed2', 'love', 'stars', 'glasses', 'shades',
      ],
      mouth: ['plain', 'lilSmile', 'wideSmile', 'sad', 'pissed', 'smileTeeth', 'smileLol', 'tongueOut'],
    },
    colours: { emojiColor: EMOJI_COLOURS },
    settle(attributes) {
      // Without eyebrows, eyes over a smile look neither sad nor angry.
      if (['sad', 'pissed'].includes(attributes.eyes)) attributes.mouth = pick(['plain', 'sad', 'pissed']);
    },
    // A disc in place of DiceBear's square.
    retouch: (elements, colours) =>
      `<circle cx="100" cy="100" r="90" fill="${colours.emojiColor}"/>` +
      `<g transform="translate(30 32) scale(.7)">${elements}</g>`,
  },
};

// Never trained on: does what was learnt hold for another hand's drawings?
const HELD_OUT_STYLES = {
  avataaars: {
    draw: avataaars,
    count: 200,
    choices: {
      top: [
        'bob', 'miaWallace', 'bun', 'curly', 'fro', 'curvy', 'straight01', 'straight02', 'straightAndStrand',
        'shortFlat', 'shortRound', 'theCaesar', 'winterHat02', 'winterHat03',
      ],
      eyes: ['default', 'default', 'closed', 'happy', 'hearts', 'wink'],
      eyebrows: ['default'],
      mouth: ['smile', 'twinkle', 'serious', 'sad', 'tongue', 'grimace'],
      clothing: ['hoodie', 'shirtCrewNeck', 'shirtScoopNeck', 'shirtVNeck'],
    },
    sometimes: {
      accessories: [0.4, ['round', 'prescription02', 'sunglasses', 'wayfarers']],
      facialHair: [0.3, ['beardMedium', 'beardMajestic', 'moustacheFancy', 'moustacheMagnum']],
    },
    colours: { hairColor: HAIRS, skinColor: SKINS, clothesColor: COATS, hatColor: COATS },
    fixed: { accessoriesColor: ['262e33'] },
  },
};

const [out, seed, scale, ...named] = process.argv.slice(2);
const random = mulberry32(Number(seed));
const lines = [];
for (const name of named.length ? named : Object.keys(STYLES)) {
  const style = STYLES[name] ?? HELD_OUT_STYLES[name];
  for (let i = 0; i < Math.round(style.count * scale); i++) {
    lines.push(JSON.stringify({ style: name, ...drawAvatar(style) }));
  }
}
shuffle(lines);
fs.writeFileSync(out, lines.join('\n') + '\n');

function drawAvatar(style) {
  const attributes = {};
  for (const [option, values] of Object.entries(style.choices)) attributes[option] = pick(values);
  for (const [option, [probability, values]] of Object.entries(style.sometimes ?? {})) {
    attributes[option] = random() < probability ? pick(values) : null;
  }
  style.settle?.(attributes);

  // DiceBear's own seed would decide only what no option says.
  const options = { seed: '', backgroundColor: [], ...style.fixed };
  for (const [option, value] of Object.entries(attributes)) {
    options[option] = value ? [value] : [];
    options[`${option}Probability`] = value ? 100 : 0;
  }
  const colours = {};
  for (const [option, palette] of Object.entries(style.colours)) {
    attributes[option] = pick(Object.keys(palette));
    colours[option] = vary(palette[attributes[option]]);
    options[option] = [colours[option].slice(1)];
  }
  options.facialHairColor = options.hairColor;

  const svg = createAvatar(style.draw, options).toString();
  const start = svg.indexOf('>') + 1;
  // The mask cuts off what lies outside of the picture, such as high buns; how much of it is shown is for later.
  const elements = svg
    .slice(start, svg.lastIndexOf('</svg>'))
    .replace(/<metadata.*?<\/metadata>/s, '')
    .replace(/<mask id="viewboxMask">.*?<\/mask>/, '')
    .replace(' mask="url(#viewboxMask)"', '');
  return { attributes, svg: svg.slice(0, start) + (style.retouch?.(elements, colours) ?? elements) + '</svg>' };
}

// DiceBear's highlights bleach dark faces and curls until they are of no colour that could be named, a cap's shadow
// looks like glasses, and hats and hair bands have one colour each.
function retouchPersonas(elements, colours) {
  return elements
    .replace(/<mask id="personas-a".*?<\/mask><g mask="url\(#personas-a\)">(.*?)<\/g>/, '$1')
    .replace('style="mix-blend-mode:overlay" opacity=".36"', 'opacity=".08"')
    .replace(/<mask id="hairCurly.*?<\/mask><g mask.*?<\/g>/, '')
    .replace(/<path opacity="\.2" d="M30 17c3\.88[^>]*>/, '')
    .replace(/#F29C65|#E15C66/g, colours.hatColor)
    .replaceAll('#F55D81', colours.hairColor);
}

function pick(values) {
  return values[Math.floor(random() * values.length)];
}

// A colour moved by at most 8 of 255 in each channel.
function vary(colour) {
  const channels = [1, 3, 5].map((i) => parseInt(colour.slice(i, i + 2), 16) + Math.round((random() * 2 - 1) * 8));
  return '#' + channels.map((v) => Math.max(0, Math.min(255, v)).toString(16).padStart(2, '0')).join('');
}

function shuffle(values) {
  for (let i = values.length - 1; i > 0; i--) {
    const j = Math.floor(random() * (i + 1));
    [values[i], values[j]] = [values[j], values[i]];
  }
}

function mulberry32(state) {
  return () => {
    state = (state + 0x6d2b79f5) | 0;
    let t = Math.imul(state ^ (state >>> 15), state | 1);
    t ^= t + Math.imul(t ^ (t >>> 7), t | 61);
    return ((t ^ (t >>> 14)) >>> 0) / 2 ** 32;
  };
}
