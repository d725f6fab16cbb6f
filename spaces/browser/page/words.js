// Words as they are typed, to classes: `Labels` of src/spar_hf/prompts_spar.py and `read_labels` of demo/engine.py.
import constants from './constants.js';
import { Refusal } from './refusal.js';

const { max_labels: MOST, max_characters: LONGEST, characters_per_label: EACH } = constants;
const shown = (text) => `'${text.length > 60 ? `${text.slice(0, 57)}...` : text}'`;
const fold = (text) => text.toUpperCase().toLowerCase();   // as Python's casefold, but for a handful of letters

function clean(name, what) {
  if (name.length > LONGEST) throw new Refusal(`${what} has ${name.length} characters; at most ${LONGEST} are read. Shorten it.`);
  if (/[\ud800-\udfff]/u.test(name)) throw new Refusal(`${what} holds half a character. Write it as text.`);
  return name.replace(/\s+/gu, ' ').trim();
}

/** Classes split by `;` or a line break, names of one class by `,`: a list of lists of names. */
export function parseWords(text) {
  if (text.length > EACH * MOST) throw new Refusal(`The words have ${text.length} characters; at most ${EACH * MOST} are read.`);
  const bare = (line) => line.trim().replace(/^;+|;+$/g, '');
  if (!bare(text).trim())
    throw new Refusal('There are no words yet. Type what you look for, such as: road; car, automobile; sky');
  const entries = bare(text).split(/\r\n|[\n\r\v\f\x1c-\x1e\x85\u2028\u2029]/).filter((line) => line.trim()).flatMap((line) => bare(line).split(';'));
  let names = 0;
  const classes = entries.map((entry, index) => {
    const parts = entry.split(',');
    if (!parts.every((part) => part.trim()))
      throw new Refusal(`Label ${index + 1} is empty in ${shown(entry)}; every label needs a name. Remove it or name it.`);
    names += parts.length;
    if (names > MOST) throw new Refusal(`There are over ${MOST} labels; at most ${MOST} are allowed. Take some out.`);
    return parts.map((part) => clean(part, `Label ${index + 1}`));
  });
  const classOf = new Map();
  classes.forEach((own, id) => {
    for (const name of own) {
      const other = classOf.get(fold(name));
      if (other === id) throw new Refusal(`Label ${id + 1} names the same thing twice: ${shown(own.join(', '))}. Remove one of them.`);
      if (other !== undefined)
        throw new Refusal(`Label ${shown(name)} is in two classes, ${other + 1} (${shown(classes[other][0])}) and ${id + 1} (${shown(own[0])}); a name belongs to one class. Remove one of them.`);
      classOf.set(fold(name), id);
    }
  });
  return classes;
}

/**
 * Names, flat, and the class of each; those that only compete come last and have class -1.
 * @param {string[][]} classes
 * @param {string[]} against names that compete
 */
export function flatNames(classes, against = []) {
  const names = classes.flat(), taken = new Set(names.map(fold));
  const more = against.filter((name) => !taken.has(fold(name)));
  return { names: [...names, ...more], classIds: [...classes.flatMap((own, id) => own.map(() => id)), ...more.map(() => -1)] };
}
