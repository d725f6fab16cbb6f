// The page: what is asked for, and the viewers that show the answer. All work is the worker's.
import { classesJson, featureValue, mapPng, overlayPng, save, segmentValue } from './answer.js';
import { Client } from './client.js';
import constants from './constants.js';
import { offline } from './offline.js';
import { takePhoto } from './camera.js';
import { mount } from './viewers.js';

const $ = (id) => document.getElementById(id);
const state = { picture: null, key: 0, model: null, from: { address: new URL(constants.shipped, location.href).href }, found: null, place: { x: 0.5, y: 0.5 }, tab: 'segment', turn: 0 };
const client = new Client(progress, (text) => say(text));
const viewers = {
  segment: mount('viewer', $('answer'), constants.hints.segment),
  features: mount('features', $('feature-view'), constants.hints.features, (_, place) => { state.place = place; look(); }),
};

// --- progress --------------------------------------------------------------------------------------------------

function progress(text, share) {
  $('work').dataset.state = 'busy';
  $('work-text').textContent = text;
  const bar = $('work').querySelector('progress');
  if (share === undefined) bar.removeAttribute('value');
  else bar.value = share;
}

function busy(is) {
  if (is) progress('Starting', undefined);
  else { $('work').dataset.state = 'idle'; $('work-text').textContent = ''; }
  $('cancel').hidden = !is;
  $('shrink').hidden = true;
  for (const id of ['run', 'look']) $(id).disabled = is && id === (state.tab === 'segment' ? 'run' : 'look');
}

const say = (text) => { $('status').textContent = text; };

/** Runs a job of the worker; a later one takes its place. Errors are told where the answer would be. */
async function job(view, work) {
  const turn = ++state.turn;
  busy(true);
  try {
    const value = await work();
    if (turn !== state.turn) return;
    busy(false);
    if (value) viewers[view].show(value);
  } catch (error) {
    if (turn !== state.turn) return;
    busy(false);
    if (error === null) return;   // cancelled
    viewers[view].show({ message: error.message });
    if (error.pixels) offerSmaller(error.pixels);
  }
}

// --- the model -------------------------------------------------------------------------------------------------

let loading = null;

/** The model, loaded once; after a cancelled job, again. */
function ready() {
  loading ??= client.call('load', { from: state.from, dtype: $('dtype').value || null, device: $('device').value || null }).then(
    (model) => {
      state.model = model;
      const { called, dtypes, dtype, runs, note, method } = model;
      $('model-name').textContent = called;
      $('model-about').textContent = `${method}, ${dtype}, ${runs}${note ? `. ${note}` : ''}`;
      $('dtype').replaceChildren(...dtypes.map((name) => new Option(name, name, name === dtype, name === dtype)));
      say(`${called} · ${dtype} · ${runs}${note ? ` · ${note}` : ''} · ${offline.says}`);
      return model;
    },
    (error) => { loading = null; throw error; },
  );
  return loading;
}

function open(from) {
  if (from) { state.from = from; $('dtype').replaceChildren(); }
  client.cancel();
  loading = null;
  state.model = null;
  $('model-name').textContent = '…';
  return job(state.tab, async () => { await ready(); });
}

function cancel() {
  client.cancel();
  loading = null;
  ++state.turn;
  busy(false);
  say('Cancelled. The next run loads the model again.');
}

// --- the two views ---------------------------------------------------------------------------------------------

const asked = () => ({ picture: state.picture, key: state.key, maxPixels: Number($('size').value) });

function need(picture) {
  if (!picture) throw new Error('There is no picture yet. Drop one, paste one, take one, or choose an example.');
}

const segment = () => job('segment', async () => {
  if (!$('words').value.trim()) throw new Error('There are no words yet. Type what you look for, such as: road; car, automobile; sky');
  need(state.picture);
  const threshold = Number($('threshold').value), model = await ready();
  const found = await client.call('segment', { ...asked(), words: $('words').value, threshold });
  state.found = { ...found, threshold };
  downloads(true);
  return segmentValue(found, model, `${state.turn}`);
});

const look = () => job('features', async () => {
  need(state.picture);
  const { place } = state, model = await ready();
  return featureValue(await client.call('features', { ...asked(), place }), model, place);
});

const again = () => (state.tab === 'segment' ? segment() : look());

function offerSmaller(pixels) {
  const smaller = constants.sizes.findLast((size) => size < pixels);
  if (!smaller) return;
  $('shrink').textContent = `Try at ${smaller / 1e6} million pixels`;
  $('shrink').hidden = false;
  $('shrink').onclick = () => { $('size').value = smaller; again(); };
}

// --- the picture -----------------------------------------------------------------------------------------------

function setPicture(file) {
  state.picture = file;
  state.key++;
  const image = $('picture').querySelector('img');
  if (image.src) URL.revokeObjectURL(image.src);
  image.src = URL.createObjectURL(file);
  image.hidden = false;
  image.onerror = () => { image.hidden = true; $('picture').querySelector('.empty').hidden = false; };
  $('picture').querySelector('.empty').hidden = true;
  downloads(false);
}

function downloads(on) {
  for (const id of ['save-overlay', 'save-map', 'save-classes']) $(id).disabled = !on;
}

async function example(name, words) {
  const response = await fetch(`pictures/${name}`);
  setPicture(new File([await response.blob()], name));
  $('words').value = words;
  $('vocabulary').value = '';
  again();
}

function choose(tab, focus = false) {
  state.tab = tab;
  for (const name of ['segment', 'features']) {
    $(name).hidden = name !== tab;
    $(`tab-${name}`).setAttribute('aria-selected', String(name === tab));
    $(`tab-${name}`).tabIndex = name === tab ? 0 : -1;
  }
  $('answer').hidden = $('downloads').hidden = tab !== 'segment';
  $('feature-view').hidden = tab !== 'features';
  if (focus) $(`tab-${tab}`).focus();
}

// --- events ----------------------------------------------------------------------------------------------------

$('run').onclick = segment;
$('look').onclick = look;
$('cancel').onclick = cancel;
$('words').onkeydown = (event) => { if (event.key === 'Enter' && (event.shiftKey || event.ctrlKey)) { event.preventDefault(); choose('segment'); segment(); } };
$('vocabulary').append(...Object.keys(constants.vocabularies).map((name) => new Option(name)));
$('vocabulary').onchange = () => { if ($('vocabulary').value) $('words').value = constants.vocabularies[$('vocabulary').value]; };
$('threshold').oninput = () => { $('threshold-value').textContent = $('threshold').value; };
$('threshold').onchange = () => { if (state.picture && $('words').value.trim()) segment(); };
$('size').append(...constants.sizes.map((size) => new Option(`${size / 1e6} million`, size, size === constants.usual_size, size === constants.usual_size)));

$('choose').onclick = () => $('file').click();
$('file').onchange = () => { if ($('file').files[0]) setPicture($('file').files[0]); $('file').value = ''; };
$('camera').onclick = () => takePhoto($('picture').querySelector('video'), $('camera')).then((file) => file && setPicture(file), (error) => viewers[state.tab].show({ message: error.message }));
document.addEventListener('paste', (event) => {
  const file = [...event.clipboardData.files].find((one) => one.type.startsWith('image/'));
  if (file) { event.preventDefault(); setPicture(file); }
});
for (const kind of ['dragover', 'drop', 'dragleave'])   // anywhere: a picture that misses its place must not replace the page
  document.addEventListener(kind, (event) => {
    if (kind !== 'dragleave') event.preventDefault();
    $('picture').classList.toggle('over', kind === 'dragover');
    if (kind === 'drop' && event.dataTransfer.files[0]) setPicture(event.dataTransfer.files[0]);
  });

$('load').onclick = () => {
  try { open({ address: new URL($('address').value.trim()).href }); }
  catch { viewers[state.tab].show({ message: `“${$('address').value.slice(0, 80)}” is no address; give one such as https://example.org/exported/.` }); }
};
$('address').onkeydown = (event) => { if (event.key === 'Enter') $('load').click(); };
$('open-folder').onclick = () => $('folder').click();
$('folder').onchange = () => { const files = [...$('folder').files]; if (files.length) open({ files }); $('folder').value = ''; };
$('shipped').onclick = () => open({ address: new URL(constants.shipped, location.href).href });
$('dtype').onchange = $('device').onchange = () => open(null);

for (const tab of ['segment', 'features']) {
  $(`tab-${tab}`).onclick = () => choose(tab);
  $(`tab-${tab}`).onkeydown = (event) => { if (['ArrowLeft', 'ArrowRight'].includes(event.key)) choose(tab === 'segment' ? 'features' : 'segment', true); };
}
$('examples').append(...constants.examples.map(([name, words]) => {
  const button = document.createElement('button'), image = document.createElement('img');
  Object.assign(image, { src: `pictures/${name}`, alt: words, loading: 'lazy' });
  Object.assign(button, { type: 'button', title: words, onclick: () => example(name, words) });
  button.append(image);
  return button;
}));
$('save-overlay').onclick = async () => save(await overlayPng(state.found), 'overlay.png');
$('save-map').onclick = async () => save(await mapPng(state.found), 'label-map.png');
$('save-classes').onclick = () => save(classesJson(state.found, state.model, state.found.threshold), 'classes.json');

if (!isSecureContext)
  viewers.segment.show({ message: 'Open this page over https, or from localhost: elsewhere browsers give a page neither threads nor storage.' });
else if (await offline.start()) job('segment', async () => { await ready(); });
